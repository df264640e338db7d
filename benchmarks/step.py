"""The `step` suite: whole training steps on real pairs, ours beside TRL's DPOTrainer.

Each run is a fresh process, so that peak memory is its own: load the model, compute reference log-probs for the pairs
of the run, take optimiser steps on them. Rounds go over all providers in turn. All providers see the same pairs, in
float32 weights with bfloat16 compute (or bfloat16 weights, --dtype), AdamW, without dropout.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import quantile, run_worker, write_rows

PROVIDERS: dict[str, dict[str, Any]] = {
    "ours-tree": {"trainer": "ours", "share": "tree"},
    "ours-pair": {"trainer": "ours", "share": "pair"},
    "ours-none": {"trainer": "ours", "share": "none"},
    "trl": {"trainer": "trl", "gradient_checkpointing": False},
    "trl-checkpointing": {"trainer": "trl", "gradient_checkpointing": True},
}
DEFAULT_PROVIDERS = ("ours-tree", "ours-pair", "ours-none", "trl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("step").add_argument
    add("--model", help="folder, GGUF file or hub id of a causal language model; without it, random weights")
    add("--data", help="step pairs in the released schema (JSONL); goes with --model")
    add("--providers", nargs="+", choices=sorted(PROVIDERS), default=list(DEFAULT_PROVIDERS))
    add("--pairs-per-step", type=int, default=8, help="pairs of an optimiser step")
    add("--steps", type=int, default=5, help="optimiser steps of each run; the first is warm-up")
    add("--repeats", type=int, default=3, help="rounds over all providers, interleaved")
    add("--max-tokens", type=int, default=2048, help="our token budget of a forward pass")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights in memory")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table of medians and writes every run as a row."""
    if (arguments.model is None) != (arguments.data is None):
        raise SystemExit("--model and --data go together")
    if arguments.model is not None:
        measure(arguments)
        return
    from benchmarks.workload import synthetic  # transformers takes seconds to import, and --help should not

    with tempfile.TemporaryDirectory() as folder:
        arguments.model, arguments.data = synthetic(Path(folder))
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    shared = {
        name: getattr(arguments, name)
        for name in ("model", "data", "pairs_per_step", "steps", "max_tokens", "dtype", "threads")
    }
    rows: list[dict[str, Any]] = []
    for repeat in range(arguments.repeats):
        for provider in arguments.providers:
            result = run_worker("benchmarks.step_worker", {**shared, **PROVIDERS[provider]})
            seconds = result["step_seconds"]
            row = {
                "provider": provider,
                "repeat": repeat,
                "pairs_per_step": arguments.pairs_per_step,
                "pairs": arguments.pairs_per_step * arguments.steps,
                "median_step_seconds": median(seconds[1:] or seconds),
                "first_step_seconds": seconds[0],
                "reference_seconds": result["reference_seconds"],
                "peak_memory_gib": result["peak_memory_gib"],
                "first_loss": result["first_loss"],
            }
            rows.append(row)
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    write_rows(arguments.output, rows)
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Medians over rounds, with the 20th and 80th percentile of pairs/s, and ratios to TRL where it ran."""
    names = dict.fromkeys(row["provider"] for row in rows)
    by_provider = {name: [row for row in rows if row["provider"] == name] for name in names}
    columns = ("pairs/s", "p20", "p80", "ref pairs/s", "peak GiB", "x TRL speed", "x TRL memory")
    print(f"\n{'provider':<18}" + "".join(f"{column:>14}" for column in columns))
    base = by_provider.get("trl")
    for name, own in by_provider.items():
        speeds = [row["pairs_per_step"] / row["median_step_seconds"] for row in own]
        memory = median(row["peak_memory_gib"] for row in own)
        reference = median(row["pairs"] / row["reference_seconds"] for row in own)
        figures = [median(speeds), quantile(speeds, 0.2), quantile(speeds, 0.8), reference, memory]
        if base:
            # Round by round, so that a drift of the machine's speed cancels.
            gains = [b["median_step_seconds"] / o["median_step_seconds"] for o, b in zip(own, base, strict=True)]
            figures += [median(gains), memory / median(row["peak_memory_gib"] for row in base)]
        print(f"{name:<18}" + "".join(f"{figure:>14.3f}" for figure in figures))
