"""Step-DPO on the pairs with `StepDPOTrainer`, and what happened along the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from examples.miniature.evaluate import measure
from examples.miniature.progress import Progress, silent
from examples.miniature.settings import Settings
from examples.miniature.sft import load
from examples.miniature.task import Problem
from stepdpo_kernels import StepDPOConfig, StepDPOLoss, StepDPOTrainer, StepPair, pack_pairs, packed_forward
from stepdpo_kernels.trainer.report import Curve, curves

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Training:
    """One training run. Curves of the pairs it trained on, by the trainer's names of its metrics ("loss", ...);
    those of the held-out pairs have "eval_" before the name; "accuracy" is greedy accuracy on `curve` problems.

    seconds: in training and its evaluation on held-out pairs, without the time that greedy accuracy took
    """

    model: Any
    curves: dict[str, Curve]
    seconds: float


class _Watch(TrainerCallback):
    """Measures greedy accuracy every few optimiser steps and reports progress."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, among: Sequence[Problem], settings: Settings, progress: Progress
    ) -> None:
        self.tokenizer, self.among, self.settings, self.progress = tokenizer, among, settings, progress
        self.accuracy: Curve = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.settings.curve_every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, kwargs["model"])
        self.progress(state.global_step, state.max_steps, f"accuracy {self.accuracy[-1][1]:.1%}")

    def _measure(self, step: int, model: Any) -> None:
        start = time.perf_counter()
        self.accuracy.append((step, measure(model, self.tokenizer, self.among, self.settings).mean))
        self.seconds += time.perf_counter() - start


def train(
    sft_folder: Path,
    output: Path,
    reference_cache: Path,
    pairs: Sequence[StepPair],
    held_out: Sequence[StepPair],
    among: Sequence[Problem],
    settings: Settings,
    progress: Progress = silent,
) -> Training:
    """Trains a copy of the SFT model and saves it to `output`."""
    model, tokenizer = load(sft_folder)
    watch = _Watch(tokenizer, among, settings, progress)
    config = StepDPOConfig(
        output_dir=str(output),
        reference_cache_dir=str(reference_cache),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        pairs_per_step=settings.pairs_per_step,
        beta=settings.beta,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        share="tree",
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.curve_every,
        eval_on_start=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = StepDPOTrainer(
        model=model,
        args=config,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - watch.seconds
    trainer.save_model()
    return Training(model.eval(), {**curves(trainer.state.log_history), "accuracy": watch.accuracy}, seconds)


@torch.no_grad()
def mean_logps(model: Any, pairs: Sequence[StepPair], settings: Settings) -> tuple[float, float]:
    """Mean log-prob of the chosen and of the rejected steps under a model, nats."""
    loss = StepDPOLoss()
    parts = [
        loss.packed_logps(packed_forward(model, batch), model.lm_head.weight, batch).view(2, -1)
        for batch in pack_pairs(pairs, settings.max_tokens_per_batch)
    ]
    chosen, rejected = torch.cat(parts, dim=1).mean(dim=1).tolist()
    return chosen, rejected
