"""The definition, in plain torch with autograd's gradient; on a CPU it is also the fast path."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdpo_kernels.ops.ragged import sum_rows
from stepdpo_kernels.types import Ragged


class PairLoss(NamedTuple):
    """What `pair_loss` gives, in the dtype of the token log-probs. The last three carry no gradient.

    losses:            (P,) weight * loss of each pair
    logps:             (2P,) log-probs of the branches in nats, chosen first, then rejected
    chosen_rewards:    (P,) beta * (policy - reference) log-ratio
    rejected_rewards:  (P,)
    margins:           (P,) chosen_rewards - rejected_rewards
    """

    losses: Tensor
    logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor


def logistic_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin), element by element, for e = label_smoothing."""
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return losses


def pair_loss(
    token_logps: Tensor,  # (R,)
    branches: Ragged,  # S rows, R columns
    chosen: Tensor,  # (P,)
    rejected: Tensor,  # (P,)
    ref_logps: Tensor | None = None,  # (2P,)
    weights: Tensor | None = None,  # (P,)
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """As `api.pair_loss`."""
    # in float64: a float32 running sum of hundreds of nats loses the digits of a margin
    sums = sum_rows(token_logps.double(), branches).to(token_logps.dtype)  # (S,)
    logps = torch.cat([sums[chosen], sums[rejected]])
    ratios = logps if ref_logps is None else logps - ref_logps.detach().to(logps.dtype)
    chosen_rewards, rejected_rewards = (beta * ratios).chunk(2)
    margins = chosen_rewards - rejected_rewards
    losses = logistic_loss(margins, label_smoothing)
    if weights is not None:
        losses = weights.detach().to(losses.dtype) * losses
    return PairLoss(losses, logps, chosen_rewards.detach(), rejected_rewards.detach(), margins.detach())
