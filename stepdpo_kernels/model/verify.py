"""The model held against itself: some pairs of a batch, packed and branch by branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels.model.attention import ordinary_attention
from stepdpo_kernels.model.backbone import backbone
from stepdpo_kernels.model.head import head_options
from stepdpo_kernels.model.support import causal_lm
from stepdpo_kernels.ops.linear_logprob import linear_logprob
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.packing.reference import unpack
from stepdpo_kernels.types import PackedBatch, StepDPOError

PAIRS = 3
# Of a difference by rounding, relative to what differs, for one layer; it adds up as a random walk.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@torch.no_grad()
def verify_first_batch(model: Any, batch: PackedBatch) -> bool:
    """Compares a few pairs, packed, with the model's own forward on every branch, and branches with one another.

    The first PAIRS pairs with two steps are taken, or with one where none has two, in the model's dtype, in eval mode
    and outside autocast. Allowed is TOLERANCES[dtype] times the root of the number of layers, of

        token log-probs   their root mean square: how far packed ones may differ from those of each branch alone
        hidden states     their norm: how far those of a branch may move when only tokens of other branches change

    Args:
        model: a transformers causal language model, also wrapped by PEFT.
        batch: on the model's device.

    Returns:
        False where no pair of the batch has a step, so that there is nothing to compare.

    Raises:
        StepDPOError: they differ by more, with the figures; the model cannot be called with a plan at all; or its
            weights are sharded over processes.
    """
    lm: Any = causal_lm(model)
    if _is_sharded(lm):
        raise StepDPOError(
            f"model {type(lm).__name__}: compare it before its weights are sharded, since each process would gather "
            "them for branches of its own: verify_first_batch(model, batch), then enable_packed_forward(model, "
            "verify=False)"
        )
    steps = batch.branches.lengths.cpu()  # (S,) tokens
    sides = (steps[batch.chosen.cpu()] > 0).long() + (steps[batch.rejected.cpu()] > 0)  # (P,) with tokens
    usable = sides.argsort(descending=True, stable=True)[: min(PAIRS, int(sides.count_nonzero()))]
    if not usable.numel():
        return False
    host = batch.to("cpu")
    picked = {name: getattr(host, name)[usable] for name in ("chosen", "rejected", "weights", "pair_index")}
    pairs = unpack(replace(host, **picked, pair_ids=[host.pair_ids[i] for i in usable.tolist()]))
    device = batch.input_ids.device
    forest = build_batch(pairs, range(len(pairs)), "tree").to(device)
    with _evaluating(lm), torch.autocast(device.type, enabled=False):
        hidden = _hidden(lm, forest)
        steps_alone = [(pair.prefix_ids, step) for pair in pairs for step in (pair.chosen_ids, pair.rejected_ids)]
        expected = torch.cat([_alone(lm, prefix, step, device) for prefix, step in steps_alone])
        difference = _logps(lm, forest, hidden) - expected
        moved = _moved(lm, forest, hidden)
    off, scale = (x.square().mean().sqrt().item() for x in (difference, expected))
    dtypes = (hidden.dtype, lm.get_output_embeddings().weight.dtype)
    tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes) * lm.config.num_hidden_layers**0.5
    allowed = f"{tolerance:.1e} of it is allowed in {hidden.dtype} with {lm.config.num_hidden_layers} layers"
    cannot = f"model {type(lm).__name__} ({lm.config.model_type}) cannot be packed: on {len(pairs)} pairs its"
    if not off <= tolerance * scale:
        raise StepDPOError(
            f"{cannot} token log-probs differ by {off:.2e} (root mean square, of {scale:.2e}) from those that it gives "
            f"each branch alone; {allowed}"
        )
    if not moved <= tolerance:
        raise StepDPOError(
            f"{cannot} hidden states move by up to {moved:.2e} of their norm when only tokens of other branches "
            f"change; {allowed}"
        )
    return True


def _is_sharded(lm: PreTrainedModel) -> bool:
    """By FSDP2 or tensor parallelism, or by ZeRO-3."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in lm.parameters())


def _hidden(lm: Any, batch: PackedBatch) -> Tensor:
    """(T, D), as `backbone`; what a model that cannot take a plan raises is named."""
    try:
        return backbone(lm, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, StepDPOError | torch.OutOfMemoryError):
            raise
        raise StepDPOError(
            f"model {type(lm).__name__} ({lm.config.model_type}) cannot be packed: {type(error).__name__}: {error}"
        ) from error


def _logps(lm: Any, batch: PackedBatch, hidden: Tensor) -> Tensor:
    """(tokens,) log-probs of every step, chosen and rejected of pair 0, then of pair 1, ..."""
    head = lm.get_output_embeddings()
    logps = linear_logprob(
        hidden[batch.rows.index], head.weight, batch.targets, bias=head.bias, **head_options(lm)
    )  # (R,)
    rows = batch.branches.index.split(batch.branches.lengths.tolist())
    return torch.cat([logps[rows[side]] for pair in zip(batch.chosen, batch.rejected, strict=True) for side in pair])


def _moved(lm: Any, batch: PackedBatch, hidden: Tensor) -> float:
    """How far a token moves, relative to its norm, when only tokens that it does not see change; shapes stay."""
    plan = batch.plan
    leaf = torch.arange(plan.num_leaves, device=hidden.device).repeat_interleave(plan.cu_q.diff())  # (T,)
    own = plan.keys.t_lengths == 1  # seen by one leaf alone
    other_ids = (batch.input_ids + 1) % lm.get_input_embeddings().num_embeddings
    moves = [hidden.new_zeros(1, dtype=torch.float32)]
    for side in range(2):  # every second leaf's
        changed = own & (leaf % 2 == side)
        moved = _hidden(lm, replace(batch, input_ids=torch.where(changed, other_ids, batch.input_ids))) - hidden
        moves.append((moved.float().norm(dim=1) / hidden.float().norm(dim=1))[~changed])
    return torch.cat(moves).max().item()


def _alone(lm: Any, prefix: np.ndarray, step: np.ndarray, device: torch.device) -> Tensor:
    """(tokens,) log-probs of a step by the model's own forward."""
    if not step.size:
        return torch.empty(0, device=device)
    input_ids = torch.from_numpy(np.concatenate([prefix, step[:-1]]).astype(np.int64)).to(device)
    targets = torch.from_numpy(step.astype(np.int64)).to(device)
    forward = getattr(lm, "_forward_without_packing", lm.forward)
    with ordinary_attention(lm):
        options = {"logits_to_keep": step.size} if "logits_to_keep" in signature(forward).parameters else {}
        logits = forward(input_ids=input_ids[None], use_cache=False, **options).logits[0, -step.size :]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(1, targets[:, None])[:, 0]


@contextmanager
def _evaluating(lm: PreTrainedModel) -> Iterator[None]:
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
