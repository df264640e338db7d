"""The formula, straight: full logits in at least float32. The twin that every implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:  # (R,)
    """log softmax(z)[target] with z = softcap(logit_scale * (hidden @ weight.T + bias)); see `api.linear_logprob`."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(compute) @ weight.to(compute).T  # (R, V)
    if bias is not None:
        logits = logits + bias.to(compute)
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1).gather(1, target[:, None])[:, 0]
