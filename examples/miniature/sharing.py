"""What encoding shared prefixes once saves: the same optimiser steps with share="none" and share="tree"."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from examples.miniature.progress import Progress, silent
from examples.miniature.settings import Settings
from examples.miniature.sft import load
from stepdpo_kernels import StepDPOLoss, StepPair, pack_pairs, packed_forward

MODES = ("none", "tree")


@dataclass(frozen=True)
class Packing:
    """One way of packing. tokens: encoded in all timed steps; seconds and losses: of each timed step."""

    tokens: int
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


def compare(
    sft_folder: Path, pairs: Sequence[StepPair], settings: Settings, progress: Progress = silent
) -> dict[str, Packing]:
    """Takes each optimiser step once in either way, in turns, from the same weights on; one untimed step first.

    The pairs come in random order, as in training. A step is packing, forward, backward and the optimiser, written
    out as in somebody's own training loop.
    """
    order = Random(settings.seed).sample(range(len(pairs)), len(pairs))
    loss_fn = StepDPOLoss(beta=settings.beta)
    models = {mode: load(sft_folder)[0].train() for mode in MODES}
    optimizers = {
        mode: torch.optim.AdamW(model.parameters(), lr=settings.learning_rate) for mode, model in models.items()
    }
    reference = load(sft_folder)[0]
    tokens = dict.fromkeys(MODES, 0)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    losses: dict[str, list[float]] = {mode: [] for mode in MODES}
    for step in range(settings.timing_steps + 1):
        first = step * settings.pairs_per_step
        chosen = [pairs[order[(first + i) % len(pairs)]] for i in range(settings.pairs_per_step)]
        for mode in MODES if step % 2 else MODES[::-1]:
            ref_logps = _reference(reference, chosen, mode, loss_fn, settings)
            start = time.perf_counter()
            loss = 0.0
            encoded = 0
            for batch, ref in zip(
                pack_pairs(chosen, settings.max_tokens_per_batch, share=mode), ref_logps, strict=True
            ):
                hidden = packed_forward(models[mode], batch)
                part = loss_fn.packed(hidden, models[mode].lm_head.weight, batch, ref, num_pairs=len(chosen)).loss
                part.backward()
                loss += part.item()
                encoded += batch.num_tokens
            optimizers[mode].step()
            optimizers[mode].zero_grad()
            if step:  # the first warms up
                seconds[mode].append(time.perf_counter() - start)
                losses[mode].append(loss)
                tokens[mode] += encoded
        progress(step + 1, settings.timing_steps + 1, "")
    return {mode: Packing(tokens[mode], tuple(seconds[mode]), tuple(losses[mode])) for mode in MODES}


@torch.no_grad()
def _reference(
    model: Any, pairs: Sequence[StepPair], mode: str, loss_fn: StepDPOLoss, settings: Settings
) -> list[torch.Tensor]:
    """Branch log-probs of the SFT model, one tensor (2P,) for each batch of these pairs."""
    return [
        loss_fn.packed_logps(packed_forward(model, batch), model.lm_head.weight, batch)
        for batch in pack_pairs(pairs, settings.max_tokens_per_batch, share=mode)
    ]
