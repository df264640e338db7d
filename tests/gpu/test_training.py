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
from transformers import PreTrainedModel

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
def test_a_step_waits_for_the_device_once(
    tiny_model: Callable[..., PreTrainedModel],
    step_records: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the weights change, to see that all is finite; logs, which come when they are asked for, wait too."""
    pairs = make_pairs(step_records(6, 4), tiny_tokenizer(), tmp_path)
    args = make_config(tmp_path, gradient_checkpointing=checkpointing, logging_steps=100, bf16=True)
    trainer = StepDPOTrainer(tiny_model(kind), args, pairs)
    norm_of, step_of = trainer._get_grad_norm, trainer.training_step
    passes: list[int] = []
    waits: list[int] = []

    def training_step(model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        passes.append(len(inputs))
        if len(passes) == 2:  # the first one compiles and tunes
            torch.cuda.set_sync_debug_mode("warn")
        before = len(told)
        loss = step_of(model, inputs, *rest)
        assert len(told) == before, told[before:]
        return loss

    def grad_norm(*given: Any, **options: Any) -> Any:
        before = len(told)
        norm = norm_of(*given, **options)
        waits.append(len(told) - before)
        return norm

    monkeypatch.setattr(trainer, "training_step", training_step)
    monkeypatch.setattr(trainer, "_get_grad_norm", grad_norm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = Synchronisations(caught)
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert max(passes) > 1
    assert len(passes) == len(waits) == 6
    assert waits[1:] == [1] * 5


class Synchronisations:
    """Those among the warnings that were caught."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught

    def __len__(self) -> int:
        return len(self[:])

    def __getitem__(self, part: slice) -> list[str]:
        return [str(w.message) for w in self._caught if "synchroniz" in str(w.message)][part]
