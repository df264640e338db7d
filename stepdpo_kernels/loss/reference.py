"""The paper's formula (arXiv 2406.18629, equation 2) from full logits: the twin of `StepDPOLoss.forward`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def step_dpo_loss(
    logits: Tensor,  # (2P, L, V)
    labels: Tensor,  # (2P, L)
    ref_logps: Tensor,  # (2P,)
    *,
    beta: float = 0.4,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,  # (P,)
) -> Tensor:
    """Mean loss over pairs, chosen branches first; labels are shifted, -100 where no loss."""
    keep = labels != -100
    token_logps = torch.log_softmax(logits, dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    logps = (token_logps * keep).sum(dim=1)
    chosen, rejected = (logps - ref_logps).chunk(2)
    margins = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return (losses if weights is None else weights * losses).mean()
