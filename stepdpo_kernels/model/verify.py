"""The model held against itself: some pairs of a batch, packed and branch by branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
# Root mean square of the difference, relative to the log-probs', for one layer; rounding adds up as a random walk.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@torch.no_grad()
def verify_first_batch(model: Any, batch: PackedBatch) -> bool:
    """Compares token log-probs of a few pairs, packed, with the model's own forward on every branch by itself.

    The first PAIRS pairs with two steps are taken, in the model's dtype, in eval mode and outside autocast. The root
    mean square of the difference may be TOLERANCES[dtype] times the root of the number of layers, of that of the
    log-probs.

    Args:
        model: a transformers causal language model, also wrapped by PEFT.
        batch: on the model's device.

    Returns:
        False where no pair of the batch has two steps, so that there is nothing to compare.

    Raises:
        StepDPOError: they differ, with the figures; the model cannot be called with a plan at all; or its weights are
            sharded over processes.
    """
    lm: Any = causal_lm(model)
    if _is_sharded(lm):
        raise StepDPOError(
            f"model {type(lm).__name__}: compare it before its weights are sharded, since each process would gather "
            "them for branches of its own: verify_first_batch(model, batch), then enable_packed_forward(model, "
            "verify=False)"
        )
    steps = batch.branches.lengths.cpu()  # (S,) tokens
    usable = ((steps[batch.chosen.cpu()] > 0) & (steps[batch.rejected.cpu()] > 0)).nonzero()[:PAIRS, 0]
    if not usable.numel():
        return False
    host = batch.to("cpu")
    picked = {name: getattr(host, name)[usable] for name in ("chosen", "rejected", "weights", "pair_index")}
    pairs = unpack(replace(host, **picked, pair_ids=[host.pair_ids[i] for i in usable.tolist()]))
    device = batch.input_ids.device
    with _evaluating(lm), torch.autocast(device.type, enabled=False):
        packed = _packed(lm, build_batch(pairs, range(len(pairs)), "tree"), device)
        alone = [
            _alone(lm, pair.prefix_ids, step, device) for pair in pairs for step in (pair.chosen_ids, pair.rejected_ids)
        ]
    dtype = lm.get_output_embeddings().weight.dtype
    expected = torch.cat(alone)
    difference, scale = (x.square().mean().sqrt().item() for x in (torch.cat(packed) - expected, expected))
    tolerance = TOLERANCES[dtype] * lm.config.num_hidden_layers**0.5
    if not difference <= tolerance * scale:
        raise StepDPOError(
            f"model {type(lm).__name__} ({lm.config.model_type}) cannot be packed: on {len(pairs)} pairs its token "
            f"log-probs differ by {difference:.2e} (root mean square, of {scale:.2e}) from those that it gives each "
            f"branch alone; {tolerance:.1e} of it is allowed in {dtype} with {lm.config.num_hidden_layers} layers"
        )
    return True


def _is_sharded(lm: PreTrainedModel) -> bool:
    """By FSDP2 or tensor parallelism, or by ZeRO-3."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in lm.parameters())


def _packed(lm: Any, batch: PackedBatch, device: torch.device) -> list[Tensor]:
    """(tokens,) log-probs of each step, chosen and rejected of pair 0, then of pair 1, ..."""
    batch = batch.to(device)
    try:
        hidden = backbone(lm, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, StepDPOError | torch.OutOfMemoryError):
            raise
        raise StepDPOError(
            f"model {type(lm).__name__} ({lm.config.model_type}) cannot be packed: {type(error).__name__}: {error}"
        ) from error
    head = lm.get_output_embeddings()
    logps = linear_logprob(
        hidden[batch.rows.index], head.weight, batch.targets, bias=head.bias, **head_options(lm)
    )  # (R,)
    rows = batch.branches.index.split(batch.branches.lengths.tolist())
    return [logps[rows[side]] for pair in zip(batch.chosen, batch.rejected, strict=True) for side in pair]


def _alone(lm: Any, prefix: np.ndarray, step: np.ndarray, device: torch.device) -> Tensor:
    """(tokens,) log-probs of a step by the model's own forward."""
    input_ids = torch.from_numpy(np.concatenate([prefix, step[:-1]]).astype(np.int64)).to(device)
    targets = torch.from_numpy(step.astype(np.int64)).to(device)
    forward = getattr(lm, "_forward_without_packing", lm.forward)
    with ordinary_attention(lm):
        logits = forward(input_ids=input_ids[None], use_cache=False).logits[0, prefix.size - 1 :]
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
