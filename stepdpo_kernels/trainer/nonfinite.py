"""Losses and gradients that are not finite: which pairs they came from, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepdpo_kernels.loss import StepDPOOutput
from stepdpo_kernels.types import PackedBatch, StepDPOError, StepPair


def check_finite(ref_logps: torch.Tensor, pairs: Sequence[StepPair], name: str) -> None:
    """Raises StepDPOError, naming them, where the reference's log-probs (N, 2) of some pairs are not finite."""
    broken = (~ref_logps.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        raise StepDPOError(
            f"{name}: the reference's log-probs of {_listed([pairs[i].id for i in broken])} are not finite: leave the "
            "pairs out, or see whether the model's weights or its precision are at fault"
        )


def finite_losses(parts: Sequence[tuple[PackedBatch, StepDPOOutput]], device: torch.device) -> torch.Tensor:
    """Whether the losses of all forward passes of a step are finite, () float32 on the device: 1 or 0."""
    losses = [output.loss.detach() for _, output in parts]
    return torch.stack(losses).isfinite().all().float() if losses else torch.ones((), device=device)


def culprits(parts: Sequence[tuple[PackedBatch, StepDPOOutput]], pairs: Sequence[StepPair]) -> str:
    """What is not finite in the forward passes of a step, with the ids of the pairs.

    Pairs whose own log-probs or margins are not finite are named alone, otherwise those of the passes whose loss is
    not finite; where every loss is finite it is a gradient, and all pairs of the step are named.
    """
    broken: list[str] = []
    suspects: list[str] = []
    everybody: list[str] = []
    for batch, output in parts:
        ids = [pairs[i].id for i in batch.pair_index.tolist()]
        numbers = torch.stack([output.chosen_logps, output.rejected_logps, output.margins])  # (3, P)
        good = numbers.isfinite().all(dim=0).tolist()
        broken += [name for name, is_good in zip(ids, good, strict=True) if not is_good]
        everybody += ids
        if not output.loss.isfinite():
            suspects += ids
    if broken:
        return f"the log-probs of {_listed(broken)} are not finite"
    if suspects:
        return f"the loss of a forward pass of {_listed(suspects)} is not finite"
    return f"every loss is finite but the gradient is not, in a step of {_listed(everybody)}"


def _listed(ids: Sequence[str]) -> str:
    return f"pair{'s' if len(ids) > 1 else ''} {', '.join(map(repr, ids))}"
