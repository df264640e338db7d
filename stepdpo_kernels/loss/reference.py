"""The formulas of the papers from full logits: the twin of `StepDPOLoss.forward`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def step_dpo_loss(
    logits: Tensor,  # (2P, L, V)
    labels: Tensor,  # (2P, L)
    ref_logps: Tensor | None = None,  # (2P,)
    *,
    beta: float = 0.4,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    simpo_gamma: float = 0.5,
    weights: Tensor | None = None,  # (P,)
    betas: Tensor | None = None,  # (P,)
    offsets: Tensor | None = None,  # (P,)
    token_weights: Tensor | None = None,  # (2P, L)
) -> Tensor:
    """Mean loss over pairs, chosen branches first; labels are shifted, -100 where no loss.

    One equation for each type, as its paper has it (Step-DPO's is equation 2 of arXiv 2406.18629); `pair_losses.py`
    names the others. Several types are added up, each times its weight. No ref_logps: their log-ratios count as 0.
    """
    keep = (labels != -100).to(logits.dtype)
    if token_weights is not None:
        keep = keep * token_weights
    token_logps = torch.log_softmax(logits, dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    logps, lengths = (token_logps * keep).sum(dim=1), keep.sum(dim=1)
    if ref_logps is None:
        ref_logps = torch.zeros_like(logps)
    win, lose = (logps - ref_logps).chunk(2)
    tokens_win, tokens_lose = (torch.where(lengths > 0, lengths, 1.0)).chunk(2)
    beta_p = torch.full_like(win, beta) if betas is None else betas
    offset = torch.zeros_like(win) if offsets is None else offsets
    e = label_smoothing
    policy_win, policy_lose = logps.chunk(2)

    def of_type(kind: str) -> Tensor:  # (P,)
        if kind == "sigmoid":
            x = beta_p * (win - lose) - offset
            return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)
        if kind == "robust":
            x = beta_p * (win - lose) - offset
            return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)
        if kind == "hinge":
            return torch.clamp(1 - (beta_p * (win - lose) - offset), min=0)
        if kind == "ipo":
            return (win / tokens_win - lose / tokens_lose - 1 / (2 * beta_p)) ** 2
        if kind == "simpo":
            x = beta_p / tokens_win * policy_win - beta_p / tokens_lose * policy_lose - simpo_gamma - offset
            return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)
        if kind == "sft":
            return -policy_win / tokens_win
        raise ValueError(f"no loss_type {kind!r}")

    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    factors = [1.0] * len(types) if loss_weights is None else loss_weights
    losses = sum((w * of_type(kind) for kind, w in zip(types, factors, strict=True)), torch.zeros_like(win))
    losses = losses - rpo_alpha * policy_win / tokens_win
    return (losses if weights is None else weights * losses).mean()
