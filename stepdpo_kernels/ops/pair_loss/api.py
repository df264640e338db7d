"""`pair_loss`: from log-probs of tokens to the loss of each pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.checks import check_below
from stepdpo_kernels.ops.pair_loss import reference
from stepdpo_kernels.ops.pair_loss.reference import PairLoss
from stepdpo_kernels.types import Ragged


def pair_loss(
    token_logps: Tensor,  # (R,)
    branches: Ragged,  # S rows, R columns
    chosen: Tensor,  # (P,) int64
    rejected: Tensor,  # (P,) int64
    ref_logps: Tensor | None = None,  # (2P,)
    weights: Tensor | None = None,  # (P,)
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    impl: str = "auto",
) -> PairLoss:
    """The Step-DPO loss of each pair (Lai et al. 2024, arXiv 2406.18629, equation 2) and the branch log-probs in it.

        logp[s] = sum of token_logps over branch s, 0 for an empty branch
        margin  = beta * ((logp[chosen] - ref[chosen]) - (logp[rejected] - ref[rejected]))
        loss    = weight * (-(1 - e) log sigmoid(margin) - e log sigmoid(-margin))          e = label_smoothing

    Differentiable in token_logps through `losses` and through `logps`. Sums are taken in float64 and rounded once; the
    same inputs give the same bits, and equal tokens of policy and reference a margin of exactly 0.

    Args:
        token_logps: (R,) float32 or float64, in nats.
        branches: S rows, each the loss rows on one branch; R columns.
        chosen, rejected: (P,) int64, branches of each pair. A branch may belong to several pairs, or to none.
        ref_logps: (2P,) log-probs of the reference, chosen first, then rejected; None counts as 0.
        weights: (P,) of the pairs; None counts as 1.
        beta: positive.
        label_smoothing: in [0, 1].
        impl: "auto", or the name of an implementation, which then raises rather than falls back.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a pair's branch that is not there (on CUDA a device-side
            assertion), or an `impl` that cannot take the inputs.
    """
    _check(token_logps, branches, chosen, rejected, ref_logps, weights)
    run = _RUN[_choose(impl, token_logps.device, token_logps.dtype)]
    with torch.autocast(token_logps.device.type, enabled=False):
        return run(
            token_logps, branches, chosen, rejected, ref_logps, weights, beta=beta, label_smoothing=label_smoothing
        )


def _check(
    token_logps: Tensor,
    branches: Ragged,
    chosen: Tensor,
    rejected: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor | None,
) -> None:
    rows = branches.t_lengths.shape[0]
    if token_logps.shape != (rows,) or token_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"token_logps must be ({rows},) float32 or float64, got {tuple(token_logps.shape)} {token_logps.dtype}"
        )
    if chosen.ndim != 1 or chosen.dtype != torch.int64:
        raise ValueError(f"chosen must be (P,) int64, got {tuple(chosen.shape)} {chosen.dtype}")
    pairs = chosen.shape[0]
    if rejected.shape != (pairs,) or rejected.dtype != torch.int64:
        raise ValueError(f"rejected must be ({pairs},) int64, got {tuple(rejected.shape)} {rejected.dtype}")
    if ref_logps is not None and ref_logps.shape != (2 * pairs,):
        raise ValueError(f"ref_logps must be ({2 * pairs},), chosen then rejected, got {tuple(ref_logps.shape)}")
    if weights is not None and weights.shape != (pairs,):
        raise ValueError(f"weights must be ({pairs},), got {tuple(weights.shape)}")
    tensors = (token_logps, branches.index, chosen, rejected, ref_logps, weights)
    devices = {str(t.device): None for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"everything that pair_loss takes must be on one device, got {', '.join(devices)}")
    for name, index in (("chosen", chosen), ("rejected", rejected)):
        check_below(index, branches.lengths.shape[0], name, "the branches")


@_dispatch.asked_once
def _choose(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation's name."""
    return _dispatch.choose("pair_loss", impl, {"token_logps": _dispatch.Kind(device, dtype)}).name


def _triton(*args: Any, **options: Any) -> PairLoss:
    from stepdpo_kernels.ops.pair_loss import triton_kernel

    return triton_kernel.pair_loss(*args, **options)


# One function under two names: a plain choice for "auto", and what use_impl("reference") means.
_RUN = {"triton": _triton, "torch": reference.pair_loss, "reference": reference.pair_loss}
_dispatch.register(
    "pair_loss",
    "triton",
    _triton,
    _dispatch.triton_why_not("token_logps", "stepdpo_kernels.ops.pair_loss.triton_kernel"),
    _dispatch.triton_why_not_auto("token_logps"),
)
for _name in ("torch", "reference"):
    _dispatch.register("pair_loss", _name, _RUN[_name], _dispatch.no_reason)
