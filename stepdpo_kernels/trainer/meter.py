"""Running sums of what a trainer logs, on the device, reduced over processes when they are read."""

from __future__ import annotations

import time

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


class Meter:
    """Sums over pairs since the last `drain`. Nothing is read back from the device before that."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (6,) of _PER_PAIR, then the loss
        self._counts = [0, 0, 0, 0]  # pairs, tokens, unshared tokens, batches
        self._since: float | None = None

    def start(self) -> None:
        """Starts the clock, unless it runs since the last drain."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, batch: PackedBatch, output: StepDPOOutput) -> None:
        parts = [getattr(output, name).sum() for name in _PER_PAIR]
        sums = torch.stack([*parts, output.loss.detach()]).float()
        self._sums = sums if self._sums is None else self._sums + sums
        counts = (batch.num_pairs, batch.num_tokens, batch.tokens_unshared, 1)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]

    def drain(self, accelerator: Accelerator, *, losses_are_sums: bool = False) -> dict[str, float]:
        """Means over the pairs of all processes, and everything starts again at zero. All processes must call it.

        losses_are_sums: the losses added were sums over pairs (num_pairs=1), so their mean is reported as well.
        """
        sums = self._sums if self._sums is not None else torch.zeros(len(_PER_PAIR) + 1, device=accelerator.device)
        counts = torch.tensor(self._counts, dtype=torch.float32, device=sums.device)
        totals = accelerator.reduce(torch.cat([sums, counts]), reduction="sum").tolist()
        *means, loss, pairs, tokens, unshared, batches = totals
        seconds = time.perf_counter() - self._since if self._since is not None else float("nan")
        self._sums, self._counts, self._since = None, [0, 0, 0, 0], None
        if not pairs:
            return {}
        return {
            **({"loss": loss / pairs} if losses_are_sums else {}),
            **{name: value / pairs for name, value in zip(_LOGGED_AS, means, strict=True)},
            "tokens/saved": 1 - tokens / unshared,
            "tokens/batch": tokens / batches,
            "pairs_per_second": pairs / seconds,
        }
