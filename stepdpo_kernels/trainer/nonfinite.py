"""Losses and gradients that are not finite: steps that must change nothing, and the pairs they came from, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.tensor import DTensor

from stepdpo_kernels.loss import StepDPOOutput
from stepdpo_kernels.trainer.sharding import runs_in_lockstep
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


class Verdict:
    """Whether the losses and the gradient of an optimiser step are finite, on all processes.

    The device finds it out between backward and update; the host waits for that where it reads it, and nowhere else.

    step:   its number, counted from 1
    parts:  its forward passes on this process
    norm:   of the gradient, over all processes; None: it is not looked at
    """

    def __init__(
        self, step: int, parts: Sequence[tuple[PackedBatch, StepDPOOutput]], norm: Any, accelerator: Accelerator
    ) -> None:
        self.step, self.parts = step, parts
        own = finite_losses(parts, accelerator.device)
        gradient = torch.ones_like(own)
        if norm is not None:
            whole = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            gradient = whole.to(own.device).isfinite().to(own)
        finite = torch.stack([own, gradient])
        if accelerator.num_processes > 1:
            finite = accelerator.reduce(finite, reduction="sum") / accelerator.num_processes
        self._flags = torch.cat([finite, own[None]])  # (3,), 1 where finite: losses, gradient; losses of this process
        self._copied: torch.cuda.Event | None = None

    def tell(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on updates of an optimiser that `skips_on_device` change nothing, unless all is finite here."""
        optimizer.found_inf = (self._flags < 1).any().float()  # type: ignore[attr-defined]
        if self._flags.is_cuda:
            stream = torch.cuda.current_stream(self._flags.device)
            self._flags = torch.empty(3, pin_memory=True).copy_(self._flags, non_blocking=True)
            self._copied = stream.record_event()

    def read(self, pairs: Sequence[StepPair]) -> str | None:
        """What is not finite, in words; None where all is. Waits for this step, and for nothing that came after it."""
        if self._copied is not None:
            self._copied.synchronize()
        losses, gradient, own = self._flags.tolist()
        if losses == gradient == 1:
            return None
        if not self.parts or (losses < 1 and own == 1):
            return "not by a pair of this process"
        return culprits(self.parts, pairs)


def unwrapped(optimizer: Any) -> Any:
    """What accelerate has prepared; other optimisers within optimisers may change weights themselves."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def skips_on_device(optimizer: Any, accelerator: Accelerator) -> bool:
    """Whether an update can be refused on the device, before the host knows of it.

    By `found_inf`, in the way of torch.amp.GradScaler: where it is 1, fused kernels leave weights, moments and step
    counts as they are. That holds for Adam and AdamW; SGD, where its first step is refused, goes on with momentum that
    nobody has initialised. Sharded weights are left out, and fp16, whose scaler has the same attribute for itself.
    """
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)  # no subclass, whose step may be another
        and all(group["fused"] for group in optimizer.param_groups)  # which may come from a checkpoint
        and accelerator.scaler is None
        and accelerator.device.type in ("cpu", "cuda")
        and not runs_in_lockstep(accelerator)
    )


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
