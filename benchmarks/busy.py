"""`python -m benchmarks busy`: the share of training steps in which the GPU computes, from torch's profiler.

Trains a model with random weights on pairs of real lengths, all weights or an adapter; the steps that are looked at
come after those that compile. A gap is time in which neither a kernel nor a copy runs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lengths import draw_lengths, pairs_of
from benchmarks.suites.step.models import SIZES, random_model
from benchmarks.suites.step.trainers import LEARNING_RATE

BEFORE, STEPS = 3, 4  # optimiser steps that are not looked at, and that are
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace
SHOWN = 12  # gaps and kernels


@dataclass(frozen=True, order=True)
class Event:
    """Times in microseconds."""

    start: float
    end: float
    name: str


@dataclass(frozen=True, order=True)
class Gap:
    """Microseconds, and the events on either side."""

    length: float
    after: str
    before: str


def run(options: argparse.Namespace) -> None:
    """Raises SystemExit for a model of no known size, and where nothing ran on a GPU."""
    if options.model not in SIZES:
        raise SystemExit(f"no model {options.model}; there are {', '.join(SIZES)}")
    with TemporaryDirectory(prefix="stepdpo-") as folder:
        trace = options.trace or Path(folder) / "trace.json"
        train(options, folder, trace)
        events = gpu_events(trace)
    if not events:
        raise SystemExit("nothing ran on a GPU while training was looked at: `busy` needs one")
    show(events, Console(width=200))


def train(options: argparse.Namespace, folder: str, trace: Path) -> None:
    """Writes the profiler's trace of STEPS optimiser steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from benchmarks.suites.step.trainers_worker import adapter, common
    from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer

    on_gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    class Looked(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (BEFORE, BEFORE + STEPS):
                if on_gpu:
                    torch.cuda.synchronize()
                (profiler.start if state.global_step == BEFORE else profiler.stop)()

    lora = options.mode == "lora"
    settings = {"folder": folder, "bf16": True, "learning_rate": LEARNING_RATE, "checkpointing": lora}
    settings |= {"steps": BEFORE + STEPS, "lora_rank": 16 * lora}
    given = common(settings) | {"logging_steps": 10 * settings["steps"], "dataloader_num_workers": options.workers}
    trainer = StepDPOTrainer(
        random_model(options.model, "bfloat16", "cuda" if on_gpu else "cpu"),
        StepDPOConfig(
            pairs_per_step=options.pairs_per_step,
            max_tokens_per_batch=options.max_tokens,
            reference_cache_dir=f"{folder}/cache",
            **given,
        ),
        train_dataset=pairs_of(draw_lengths(settings["steps"] * options.pairs_per_step), SIZES[options.model][5]),
        peft_config=adapter(settings),
        callbacks=[Looked()],
    )
    trainer.train()
    profiler.export_chrome_trace(str(trace))


def gpu_events(trace: Path) -> list[Event]:
    """By their beginnings."""
    found = json.loads(trace.read_text())["traceEvents"]
    return sorted(Event(e["ts"], e["ts"] + e["dur"], e["name"]) for e in found if e.get("cat") in ON_GPU)


def gaps(events: Sequence[Event]) -> list[Gap]:
    """Between the first event and the last one, in their order; several streams may overlap."""
    found, last = [], events[0]
    for event in events[1:]:
        if event.start > last.end:
            found.append(Gap(event.start - last.end, last.name, event.name))
        if event.end > last.end:
            last = event
    return found


def show(events: Sequence[Event], console: Console) -> None:
    whole = max(event.end for event in events) - events[0].start
    idle = gaps(events)
    share = 1 - sum(gap.length for gap in idle) / whole
    console.print(f"the GPU was busy for {share:.1%} of {whole / 1e6:.3f} s, {STEPS} optimiser steps")
    table = Table("longest gaps, us", "after", "before", title="")
    for gap in sorted(idle, reverse=True)[:SHOWN]:
        table.add_row(f"{gap.length:.0f}", gap.after[:80], gap.before[:80])
    console.print(table)
    calls = Counter(event.name for event in events)
    taken: dict[str, float] = defaultdict(float)
    for event in events:
        taken[event.name] += event.end - event.start
    table = Table("kernels and copies", "calls", "share of the time")
    for name, time in sorted(taken.items(), key=lambda item: -item[1])[:SHOWN]:
        table.add_row(name[:120], str(calls[name]), f"{time / whole:.1%}")
    console.print(table)
