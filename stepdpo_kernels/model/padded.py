"""A model on the forest of a padded batch, with its results in the places of the padded one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepdpo_kernels.model.backbone import backbone_outputs
from stepdpo_kernels.model.forward import run_head, verify_once
from stepdpo_kernels.model.head import head_options
from stepdpo_kernels.model.support import causal_lm
from stepdpo_kernels.ops.linear_logprob import Statistics, linear_logprob, linear_statistics
from stepdpo_kernels.ops.ragged import gather_rows
from stepdpo_kernels.packing import PaddedForest


class PaddedLogps(NamedTuple):
    """What `padded_logps` gives.

    logps:          (2P, W-1) float32: column t has the log-prob of token t+1, 0 where none is wanted
    statistics:     of the distributions that these tokens are drawn from, each (2P, W-1), 0 where none is wanted
    router_logits:  of each layer with experts, (2P * W, experts)
    """

    logps: Tensor
    statistics: Statistics | None
    router_logits: tuple[Tensor, ...] | None


def padded_logps(
    model: Any, forest: PaddedForest, *, statistics: bool = False, router_logits: bool = False
) -> PaddedLogps:
    """Log-probs of a padded batch's tokens from one pass over its forest; they carry a gradient.

    Call it within the forward of what FSDP, ZeRO or DDP wraps, as `enable_packed_forward` does, where one of them does.

    Args:
        model: a transformers causal language model, also wrapped by PEFT.
        forest: of `pack_padded`, on the model's device.
        statistics: also entropy and the like, without a gradient, for one more product with the head's weight.
        router_logits: of a mixture of experts, those of every token; `pack_padded(..., every_token=True)`.

    Raises StepDPOError as `packed_forward` does, but for models that cannot be packed: `check_supported` says those.
    """
    lm, batch = causal_lm(model), forest.batch
    verify_once(lm, batch)
    options = head_options(lm)
    outputs = backbone_outputs(lm, batch, **({"output_router_logits": True} if router_logits else {}))

    def head(hidden: Tensor, lm_head: nn.Module) -> tuple[Tensor, Statistics | None]:
        rows = gather_rows(hidden, batch.rows)  # (R, D)
        problem = (rows, lm_head.weight, batch.targets)
        found = linear_logprob(*problem, bias=lm_head.bias, **options)  # type: ignore[arg-type]
        if not statistics:
            return found, None
        return found, linear_statistics(*problem, bias=lm_head.bias, **options)  # type: ignore[arg-type]

    logps, found = run_head(lm, head, outputs.last_hidden_state[0])
    routers = None
    if router_logits:
        assert forest.nodes is not None
        routers = tuple(gather_rows(layer, forest.nodes) for layer in outputs.router_logits)
    return PaddedLogps(
        _scatter(logps, forest), None if found is None else Statistics(*(_scatter(x, forest) for x in found)), routers
    )


def _scatter(values: Tensor, forest: PaddedForest) -> Tensor:
    """(R,) -> (2P, W-1)"""
    table = torch.zeros(forest.mask.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(forest.mask, gather_rows(values, forest.tokens))
