"""The Step-DPO loss on branch log-probs (Lai et al. 2024, arXiv 2406.18629, equation 2).

    h = (log pi(s_win | c) - log ref(s_win | c)) - (log pi(s_lose | c) - log ref(s_lose | c))
    loss = -log sigmoid(beta * h)

with label smoothing e (conservative DPO, Mitchell 2023): -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdpo_kernels.ops.linear_logprob import linear_logprob
from stepdpo_kernels.ops.ragged import gather_rows, sum_rows
from stepdpo_kernels.types import PackedBatch

LOSS_TYPES = ("sigmoid",)


@dataclass(frozen=True)
class StepDPOOutput:
    """What a call of StepDPOLoss gives. All but `loss` are detached, (P,) float32, for metrics.

    loss:                              scalar, the only part that carries a gradient
    chosen_logps, rejected_logps:      log-probs of the two steps under the policy, nats
    chosen_rewards, rejected_rewards:  beta * (policy - reference) log-ratio
    margins:                           chosen_rewards - rejected_rewards
    accuracy:                          1.0 where the margin is positive, else 0.0
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor


class StepDPOLoss(nn.Module):
    """Step-DPO from hidden states and the head's weight; the logits are never held in full.

    Args:
        beta: strength of the pull towards the reference; the paper uses 0.4 and 0.5.
        loss_type: "sigmoid".
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5).
        reference_free: leave the reference out (its log-ratios count as 0).
        softcap, logit_scale: as in `linear_logprob`, for models that transform their logits.
        impl: implementation of `linear_logprob`.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self,
        beta: float = 0.4,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        softcap: float | None = None,
        logit_scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {beta}")
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing
        self.reference_free = reference_free
        self.softcap, self.logit_scale, self.impl = softcap, logit_scale, impl

    def forward(
        self,
        hidden: Tensor,  # (2P, L, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (2P, L)
        ref_logps: Tensor | None = None,  # (2P,)
        *,
        bias: Tensor | None = None,
        num_pairs: float | None = None,
    ) -> StepDPOOutput:
        """Loss of padded branches, the chosen first, then the rejected.

        Args:
            hidden: (2P, L, D) final hidden states, inputs of the head.
            weight: (V, D) of the head. A weight or hidden that needs no gradient costs none.
            labels: (2P, L) int64, already shifted: labels[:, t] is what hidden[:, t] predicts, -100 where no loss.
            ref_logps: (2P,) sums of the reference's log-probs over the same labels; None only with reference_free.
            bias: (V,) of the head.
            num_pairs: what to divide the summed loss by instead of P, so that parts of a batch add up.

        Raises ValueError for shapes that do not fit and for missing ref_logps.
        """
        if hidden.ndim != 3 or hidden.shape[0] % 2 or labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"hidden must be (2P, L, D) and labels (2P, L), got {tuple(hidden.shape)} and {tuple(labels.shape)}"
            )
        keep = labels != -100
        token_logps = self._token_logps(hidden[keep], weight, labels[keep], bias)  # (R,)
        table = token_logps.new_zeros(labels.shape).masked_scatter(keep, token_logps)  # (2P, L)
        chosen, rejected = table.sum(dim=1, dtype=torch.float64).to(table.dtype).chunk(2)
        return self._pair_loss(chosen, rejected, ref_logps, torch.ones_like(chosen), num_pairs)

    def packed(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        batch: PackedBatch,
        ref_logps: Tensor | None = None,  # (2P,)
        *,
        bias: Tensor | None = None,
        num_pairs: float | None = None,
    ) -> StepDPOOutput:
        """Loss of a packed forest, each pair weighted by its weight.

        Args:
            hidden: (T, D) of `packed_forward`.
            weight, bias, num_pairs: as in `forward`.
            batch: the forest, on the same device.
            ref_logps: (2P,) branch log-probs of the reference in the batch's pair order, chosen first, then rejected.

        Raises ValueError for shapes that do not fit and for missing ref_logps.
        """
        if hidden.ndim != 2 or hidden.shape[0] != batch.num_tokens:
            raise ValueError(f"hidden must be ({batch.num_tokens}, D), got {tuple(hidden.shape)}")
        chosen, rejected = self.packed_logps(hidden, weight, batch, bias=bias).chunk(2)
        return self._pair_loss(chosen, rejected, ref_logps, batch.weights, num_pairs)

    def packed_logps(
        self, hidden: Tensor, weight: Tensor, batch: PackedBatch, *, bias: Tensor | None = None
    ) -> Tensor:  # (2P,)
        """Branch log-probs of a packed forest, chosen first, then rejected: what a reference contributes."""
        token_logps = self._token_logps(gather_rows(hidden, batch.rows), weight, batch.targets, bias)  # (R,)
        # in float64: a float32 running sum of hundreds of nats loses the digits of a margin
        branches = sum_rows(token_logps.double(), batch.branches).to(token_logps.dtype)  # (S,)
        return torch.cat([branches[batch.chosen], branches[batch.rejected]])

    def _token_logps(self, rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        return linear_logprob(
            rows,
            weight,
            targets,
            bias=bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            impl=self.impl,
        )

    def _pair_loss(
        self,
        chosen: Tensor,  # (P,)
        rejected: Tensor,  # (P,)
        ref_logps: Tensor | None,  # (2P,)
        weights: Tensor,  # (P,)
        num_pairs: float | None,
    ) -> StepDPOOutput:
        pairs = chosen.shape[0]
        if self.reference_free:
            ref_chosen = ref_rejected = torch.zeros_like(chosen)
        elif ref_logps is None:
            raise ValueError("ref_logps is missing: pass the reference's branch log-probs, or set reference_free=True")
        elif ref_logps.shape != (2 * pairs,):
            raise ValueError(f"ref_logps must be ({2 * pairs},), chosen then rejected, got {tuple(ref_logps.shape)}")
        else:
            ref_chosen, ref_rejected = ref_logps.detach().to(chosen.dtype).chunk(2)
        chosen_rewards = self.beta * (chosen - ref_chosen)
        rejected_rewards = self.beta * (rejected - ref_rejected)
        margins = chosen_rewards - rejected_rewards
        losses = -F.logsigmoid(margins)
        if self.label_smoothing:
            losses = (1 - self.label_smoothing) * losses - self.label_smoothing * F.logsigmoid(-margins)
        total = (weights.to(losses.dtype) * losses).sum()
        return StepDPOOutput(
            loss=total / (max(pairs, 1) if num_pairs is None else num_pairs),
            chosen_logps=chosen.detach(),
            rejected_logps=rejected.detach(),
            chosen_rewards=chosen_rewards.detach(),
            rejected_rewards=rejected_rewards.detach(),
            margins=margins.detach(),
            accuracy=(margins.detach() > 0).to(torch.float32),
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, loss_type={self.loss_type!r}, label_smoothing={self.label_smoothing}"
