"""`LigerFusedLinearDPOLoss` of Liger-Kernel 0.8 with our head: another import, the same numbers.

    from stepdpo_kernels.integrations.liger import FusedLinearStepDPOLoss as LigerFusedLinearDPOLoss

Liger goes through the pairs one by one and meets each label of -100 with the whole vocabulary; here all tokens that
have a label go through the head together, and no others. With the log-ratios r_w and r_l of the chosen and the
rejected answer to the reference, x = beta * (r_w - r_l) and s = sigmoid, the types of loss that it knows are

    sigmoid    -log s(x)                                             Rafailov et al. 2023, arXiv 2305.18290
    hinge      max(0, 1 - x)                                         Zhao et al. 2023, arXiv 2305.10425
    robust     (-(1 - e) log s(x) + e log s(-x)) / (1 - 2e)          Chowdhury et al. 2024, arXiv 2403.00409
    exo_pair   s(x) (log s(x) - log(1 - e)) + s(-x) (log s(-x) - log e)           Ji et al. 2024, arXiv 2402.00856
    nca_pair   -log s(beta r_w) - (log s(-beta r_w) + log s(-beta r_l)) / 2     Chen et al. 2024, arXiv 2402.05369
    bco_pair   -log s(beta r_w) - log s(-beta r_l)                   Jung et al. 2024, arXiv 2404.04656
    sppo_hard  (r_w - 1 / 2 beta)^2 + (r_l + 1 / 2 beta)^2           Wu et al. 2024, arXiv 2405.00675
    apo_zero   s(-beta r_w) + s(beta r_l)                            D'Oosterlinck et al. 2024, arXiv 2408.06266
    apo_down   s(beta r_w) + s(-x)                                   the same
    discopop   s(-x / t) (-log s(x)) + s(x / t) e^-x                 Lu et al. 2024, arXiv 2406.08414
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdpo_kernels.loss import StepDPOLoss

# (beta r_w, beta r_l, beta, e, t) -> (P,)
_Loss = Callable[[Tensor, Tensor, float, float, float], Tensor]


def _robust(c: Tensor, r: Tensor, beta: float, e: float, t: float) -> Tensor:
    return (-(1 - e) * F.logsigmoid(c - r) + e * F.logsigmoid(r - c)) / (1 - 2 * e)


def _exo_pair(c: Tensor, r: Tensor, beta: float, e: float, t: float) -> Tensor:
    x = c - r
    right = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-e))
    return right + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(e))


def _discopop(c: Tensor, r: Tensor, beta: float, e: float, t: float) -> Tensor:
    x = c - r
    return torch.sigmoid(-x / t) * -F.logsigmoid(x) + torch.sigmoid(x / t) * torch.exp(-x)


_LOSSES: dict[str, _Loss] = {
    "sigmoid": lambda c, r, *_: -F.logsigmoid(c - r),
    "hinge": lambda c, r, *_: torch.relu(1 - (c - r)),
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": lambda c, r, *_: -F.logsigmoid(c) - 0.5 * (F.logsigmoid(-c) + F.logsigmoid(-r)),
    "bco_pair": lambda c, r, *_: -F.logsigmoid(c) - F.logsigmoid(-r),
    "sppo_hard": lambda c, r, beta, *_: ((c - 0.5) / beta) ** 2 + ((r + 0.5) / beta) ** 2,
    "apo_zero": lambda c, r, *_: torch.sigmoid(-c) + torch.sigmoid(r),
    "apo_down": lambda c, r, *_: torch.sigmoid(c) + torch.sigmoid(r - c),
    "discopop": _discopop,
}


class _Metrics(NamedTuple):
    """chosen_logps, rejected_logps, chosen_rewards, rejected_rewards: (P,); the others scalars."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor
    nll_loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class FusedLinearStepDPOLoss(nn.Module):
    """DPO from hidden states, with the arguments, the order of call and the results of `LigerFusedLinearDPOLoss`.

    Args:
        ignore_index: label of positions without a loss.
        beta: strength of the pull towards the reference.
        alpha: weight of the negative log-likelihood of the chosen answers, where `compute_nll_loss` asks for it.
        compute_nll_loss: add it: a mean over all chosen tokens of the call.
        compiled, chunk_size: taken for Liger's sake; nothing is compiled, and chunks are of the vocabulary.
        use_ref_model: take a reference; without one its log-probs count as 0.
        average_log_prob: log-probs per token in place of their sums.
        loss_type: one of those at the head of this file.
        label_smoothing: e there, of "robust" in [0, 0.5), of "exo_pair" in (0, 1); other types leave it out.
        discopop_tau: t there.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in _LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(_LOSSES)}, got {loss_type!r}")
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing of loss_type 'robust' must be in [0, 0.5), got {label_smoothing}")
        if loss_type == "exo_pair" and not 0 < label_smoothing < 1:
            raise ValueError(
                f"label_smoothing of loss_type 'exo_pair' must be in (0, 1), 1e-3 in its paper, got {label_smoothing}"
            )
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.use_ref_model = compute_nll_loss, use_ref_model
        self.average_log_prob = average_log_prob
        self.loss_type, self.label_smoothing, self.discopop_tau = loss_type, label_smoothing, discopop_tau
        self.log_probs = StepDPOLoss(beta)

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2P, T, H)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2P, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, _Metrics]:
        """The loss, and what Liger returns beside it.

        Args:
            lin_weight: (V, H) of the head.
            _input: (2P, T, H) hidden states, the chosen answers first, then the rejected.
            target: (2P, T) int64, already shifted: target[:, t] is what _input[:, t] predicts; ignore_index elsewhere.
            bias: (V,) of the head.
            ref_input, ref_weight, ref_bias: of the reference, which gets no gradient.

        Returns:
            loss: scalar, a mean over pairs.
            metrics: detached log-probs (P,) of both answers, means of all logits of both halves, the negative
                log-likelihood, and rewards (P,) of both answers, in this order.

        Raises ValueError for shapes that do not fit and for a reference that is missing.
        """
        if _input.ndim != 3 or _input.shape[0] % 2 or target.shape != _input.shape[:2]:
            raise ValueError(
                f"_input must be (2P, T, H) and target (2P, T), got {tuple(_input.shape)} and {tuple(target.shape)}"
            )
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("use_ref_model needs ref_input and ref_weight: pass them, or set use_ref_model=False")
        labels = target.masked_fill(target == self.ignore_index, -100)
        pairs = target.shape[0] // 2
        lengths = (labels != -100).sum(1)  # (2P,)
        divisor = lengths if self.average_log_prob else torch.ones_like(lengths)
        ref_logps: Tensor | float = 0.0
        if self.use_ref_model and ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                ref_logps = self.log_probs.logps(ref_input, ref_weight, labels, bias=ref_bias) / divisor

        def loss_of(sums: Tensor) -> tuple[Tensor, list[Tensor]]:
            logps = sums / divisor
            rewards = self.beta * (logps - ref_logps)
            chosen, rejected = rewards.chunk(2)
            losses = _LOSSES[self.loss_type](chosen, rejected, self.beta, self.label_smoothing, self.discopop_tau)
            loss, nll = losses.sum() / pairs, torch.zeros_like(losses.sum())
            if self.compute_nll_loss:
                nll = -sums[:pairs].sum() / lengths[:pairs].sum()
                loss = loss + self.alpha * nll
            return loss, [x.detach() for x in (*logps.chunk(2), nll, chosen, rejected)]

        loss, (chosen_logps, rejected_logps, nll, chosen, rejected) = self.log_probs.pairwise(
            _input, lin_weight, labels, loss_of, bias=bias
        )
        chosen_mean, rejected_mean = _logit_means(_input, lin_weight, bias)
        metrics = (chosen_logps, rejected_logps, chosen_mean, rejected_mean, nll, chosen, rejected)
        return loss, _Metrics(*metrics)


@torch.no_grad()
def _logit_means(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Of the logits at all positions, labelled or not, of the chosen and of the rejected half."""
    mean_weight = weight.sum(0, dtype=torch.float32) / weight.shape[0]  # (H,)
    mean_bias = 0.0 if bias is None else bias.float().mean()
    return [half.float().mean((0, 1)) @ mean_weight + mean_bias for half in hidden.chunk(2)]
