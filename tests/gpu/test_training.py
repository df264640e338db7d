"""Training on a CUDA device: fifty steps of half a billion weights, and where a step waits for the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from benchmarks.lengths import draw_lengths, pairs_of
from benchmarks.suites.step.models import SIZES, random_model
from stepdpo_kernels.trainer import StepDPOTrainer
from tests.trainer.test_adapters import lora
from tests.trainer.training import losses, make_config, make_pairs

pytestmark = pytest.mark.gpu
MODEL = "Qwen2-0.5B"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_fifty_steps(adapter: bool, tmp_path: Path) -> None:
    pairs = pairs_of(draw_lengths(64), SIZES[MODEL][5])
    fields = {"pairs_per_step": 8, "max_steps": 50, "max_tokens_per_batch": 4096, "logging_steps": 1}
    args = make_config(tmp_path, bf16=True, learning_rate=1e-3 if adapter else 1e-4, **fields)
    peft_config = lora(r=16, target_modules="all-linear") if adapter else None
    trainer = StepDPOTrainer(random_model(MODEL, "float32", "cpu"), args, pairs, peft_config=peft_config)
    trainer.train()
    found = losses(trainer)
    assert len(found) == trainer.state.global_step == 50
    assert found[0] == pytest.approx(math.log(2), rel=1e-6)  # the policy is its own reference
    assert mean(found[-8:]) < 0.9 * math.log(2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_step_never_waits_for_the_device(
    tiny_model: Callable[..., PreTrainedModel],
    step_records: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packing, passes, norm, update and schedule; logs, which come when they are asked for, wait.

    torch tells what synchronises, but for events. So a kernel of half a second is queued behind the passes of a step,
    and for the host the step has ended while it runs.
    """
    pairs = make_pairs(step_records(6, 4), tiny_tokenizer(), tmp_path)
    args = make_config(tmp_path, gradient_checkpointing=checkpointing, logging_steps=100, bf16=True)
    trainer = StepDPOTrainer(tiny_model(kind), args, pairs)
    step_of = trainer.training_step
    passes: list[int] = []
    waits: list[list[str]] = []
    busy: list[bool] = []
    asleep: list[torch.cuda.Event] = []

    def training_step(model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        passes.append(len(inputs))
        if len(passes) == 2:  # the first one compiles and tunes
            torch.cuda.set_sync_debug_mode("warn")
        loss = step_of(model, inputs, *rest)
        if len(passes) > 3:  # the sums of the metrics begin in the second one, and loading a kernel may wait
            torch.cuda._sleep(2**30)
            asleep.append(torch.cuda.Event())
            asleep[-1].record()
        return loss

    class Watch(TrainerCallback):
        def on_step_end(self, *given: Any, **options: Any) -> None:
            waits.append(told[:])
            busy.extend(not event.query() for event in asleep[-1:])

    monkeypatch.setattr(trainer, "training_step", training_step)
    trainer.add_callback(Watch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = Synchronisations(caught)
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert max(passes) > 1
    assert len(passes) == 6
    assert waits == [[]] * 6
    assert busy == [True] * 3
    assert told[:]  # the log at the end of training reads its sums: what is caught here are such waits


class Synchronisations:
    """Those among the warnings that were caught."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught

    def __getitem__(self, part: slice) -> list[str]:
        return [str(w.message) for w in self._caught if "synchroniz" in str(w.message)][part]
