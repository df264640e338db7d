"""Running sums of what a trainer logs, on the device, reduced over processes when they are read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdpo_kernels.loss import StepDPOOutput
from stepdpo_kernels.types import PackedBatch

_PER_PAIR = ("chosen_rewards", "rejected_rewards", "margins", "accuracy", "chosen_logps", "rejected_logps")
_LOGGED_AS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class Totals(NamedTuple):
    """Of this process since the meter was reset.

    pairs:     pairs
    tokens:    tokens encoded, shared ones once
    unshared:  tokens that as many unshared branches have
    batches:   forward passes
    seconds:   of packing and training, without evaluation and saving
    """

    pairs: int
    tokens: int
    unshared: int
    batches: int
    seconds: float


class Meter:
    """Sums over pairs since the last `drain`. Nothing is read back from the device before that."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None  # (6,) of _PER_PAIR, then the loss
        self._counts = [0, 0, 0, 0]  # pairs, tokens, unshared tokens, batches
        self._held: Sequence[tuple[PackedBatch, StepDPOOutput]] = ()
        self._since: float | None = None
        self._seconds = 0.0  # of this interval, before the clock last stood still
        self._drained = [0, 0, 0, 0]
        self._drained_seconds = 0.0

    def start(self) -> None:
        """Starts the clock, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock for what is not training, once the device has done what it was given."""
        if self._since is not None:
            if self._sums is not None and self._sums.device.type != "cpu":
                torch.accelerator.synchronize(self._sums.device)
            self._seconds, self._since = self._elapsed(), None

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def totals(self) -> Totals:
        """Host numbers alone, with those of a step that is held: reading them waits for no device."""
        counts = [self._drained, self._counts, *(_counts(batch) for batch, _ in self._held)]
        pairs, tokens, unshared, batches = map(sum, zip(*counts, strict=True))
        return Totals(pairs, tokens, unshared, batches, self._drained_seconds + self._elapsed())

    def hold(self, parts: Sequence[tuple[PackedBatch, StepDPOOutput]]) -> None:
        """The forward passes of an optimiser step, until it is known whether they count."""
        self._held = parts

    def settle(self, *, counts: bool) -> None:
        """Adds what is held, or drops it."""
        for batch, output in self._held if counts else ():
            self.add(batch, output)
        self._held = ()

    def add(self, batch: PackedBatch, output: StepDPOOutput) -> None:
        parts = [getattr(output, name).sum() for name in _PER_PAIR]
        sums = torch.stack([*parts, output.loss.detach()]).float()
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = [a + b for a, b in zip(self._counts, _counts(batch), strict=True)]

    def drain(self, accelerator: Accelerator, *, steps: int | None = None) -> dict[str, float]:
        """Means over the pairs of all processes, and the next interval starts at zero. All processes must call it.

        steps: optimiser steps of which the losses added are parts; None: they are sums over pairs (num_pairs=1)
        """
        sums = self._sums if self._sums is not None else torch.zeros(len(_PER_PAIR) + 1, device=accelerator.device)
        counts = torch.tensor(self._counts, dtype=torch.float32, device=sums.device)
        totals = accelerator.reduce(torch.cat([sums, counts]), reduction="sum").tolist()
        *means, loss, pairs, tokens, unshared, batches = totals
        seconds = self._elapsed()
        self._drained = [a + b for a, b in zip(self._drained, self._counts, strict=True)]
        self._drained_seconds += seconds
        self._sums, self._counts, self._since, self._seconds = None, [0, 0, 0, 0], None, 0.0
        if not pairs:
            return {}
        return {
            "loss": loss / (pairs if steps is None else steps * accelerator.num_processes),
            **{name: value / pairs for name, value in zip(_LOGGED_AS, means, strict=True)},
            "tokens/saved": 1 - tokens / unshared,
            "tokens/batch": tokens / batches,
            "tokens/encoded": tokens,
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
        }


def _counts(batch: PackedBatch) -> tuple[int, int, int, int]:
    return batch.num_pairs, batch.num_tokens, batch.tokens_unshared, 1
