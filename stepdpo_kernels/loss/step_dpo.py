"""The Step-DPO loss on branch log-probs (Lai et al. 2024, arXiv 2406.18629, equation 2) and its relatives.

    h = (log pi(s_win | c) - log ref(s_win | c)) - (log pi(s_lose | c) - log ref(s_lose | c))
    loss = -log sigmoid(beta * h)

What other types of loss make of h stands in pair_losses.py beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from stepdpo_kernels.loss.pair_losses import (
    LENGTH_NORMALISED,
    REFERENCE_FREE,
    check_options,
    mixture_of,
    pair_losses,
    per_token,
)
from stepdpo_kernels.ops.linear_logprob import Ends, grouped_logprob, linear_loss
from stepdpo_kernels.ops.pair_loss import PairLoss, pair_loss
from stepdpo_kernels.ops.ragged import gather_rows, sum_rows
from stepdpo_kernels.types import PackedBatch

_T = TypeVar("_T")


class StepDPOOutput(NamedTuple):
    """What a call of StepDPOLoss gives. All but `loss` are detached, (P,) float32, for metrics.

    loss:                              scalar, the only part that carries a gradient
    chosen_logps, rejected_logps:      log-probs of the two steps under the policy, nats; with token weights the
                                       weighted sums
    chosen_rewards, rejected_rewards:  beta * (policy - reference) log-ratio; of length-normalised losses per token
    margins:                           chosen_rewards - rejected_rewards
    accuracy:                          1.0 where the margin is positive, else 0.0

    Of several types of loss, rewards and margins are those of the first that is not "sft", which has none of its own;
    alone it gets those of "sigmoid" without a reference.
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
        beta: strength of the pull towards the reference; the paper uses 0.4 and 0.5. Of "ipo" it is tau.
        loss_type: "sigmoid" (Step-DPO), "robust", "hinge", "ipo", "simpo" or "sft"; pair_losses.py has equations and
            sources. Several of them are added up, each with margins of its own from the same log-probs.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5). With "sigmoid" and "simpo"
            conservative; "robust" needs it; "hinge", "ipo" and "sft" have no place for it.
        reference_free: leave the reference out (its log-ratios count as 0). "simpo" and "sft" always do.
        softcap, logit_scale: as in `linear_logprob`, for models that transform their logits.
        impl: implementation of `linear_logprob`.
        rpo_alpha: weight of an added negative log-likelihood of the chosen step per token (RPO, Pang et al. 2024,
            arXiv 2404.19733, equation 1), multiplied by the pair's weight like the rest.
        simpo_gamma: target margin of "simpo" in units of reward; 0.5 unless given, and for no other loss.
        loss_weights: factor of each loss_type, finite and >= 0, not all 0; 1 unless given.

    An empty branch has a log-prob of 0, in sums and per token; a pair of two has a margin of 0 and no gradient.

    Raises ValueError for values outside these ranges and for an option that the loss has no place for.
    """

    def __init__(
        self,
        beta: float = 0.4,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        softcap: float | None = None,
        logit_scale: float | None = None,
        impl: str = "auto",
        *,
        rpo_alpha: float = 0.0,
        simpo_gamma: float | None = None,
        loss_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.mixture = mixture_of(loss_type, loss_weights)  # the weight of each type
        check_options(beta, loss_type, self.mixture, label_smoothing, rpo_alpha, simpo_gamma)
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing
        self.loss_weights = loss_weights
        self._has_reference = any(kind not in REFERENCE_FREE for kind in self.mixture)
        self.reference_free = reference_free or not self._has_reference
        self.softcap, self.logit_scale, self.impl = softcap, logit_scale, impl
        self.rpo_alpha, self.simpo_gamma = rpo_alpha, simpo_gamma

    def forward(
        self,
        hidden: Tensor,  # (2P, L, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (2P, L)
        ref_logps: Tensor | None = None,  # (2P,)
        *,
        bias: Tensor | None = None,
        num_pairs: float | None = None,
        weights: Tensor | None = None,  # (P,)
        betas: Tensor | None = None,  # (P,)
        offsets: Tensor | None = None,  # (P,)
        token_weights: Tensor | None = None,  # (2P, L)
    ) -> StepDPOOutput:
        """Loss of padded branches, the chosen first, then the rejected.

        Args:
            hidden: (2P, L, D) final hidden states, inputs of the head.
            weight: (V, D) of the head. A weight or hidden that needs no gradient costs none.
            labels: (2P, L) int64, already shifted: labels[:, t] is what hidden[:, t] predicts, -100 where no loss.
            ref_logps: (2P,) sums of the reference's log-probs over the same labels; None only without a reference.
            bias: (V,) of the head.
            num_pairs: what to divide the summed loss by instead of P, so that parts of a batch add up.
            weights: (P,) factors on the pairs' losses; 1 unless given.
            betas: (P,) positive, each pair's own beta.
            offsets: (P,) subtracted from the margins before the loss, in units of reward: a target margin for each
                pair (ODPO, Amini et al. 2024, arXiv 2402.10571). Not for "ipo", whose target is 1 / (2 beta).
            token_weights: (2P, L) not negative: how often a token's log-prob counts in its branch's sum and in its
                length. 0 is as good as a label of -100. ref_logps must be sums with the same weights. What stands at
                labels of -100 is not read.

        Raises ValueError for shapes that do not fit, for missing ref_logps and for ref_logps where no type has a
        reference.
        """
        _check_padded(hidden, labels)
        self._check(labels.shape[0] // 2, ref_logps, weights=weights, betas=betas, offsets=offsets)
        branches = _Branches(labels, token_weights)

        def output_of(token_logps: Tensor) -> StepDPOOutput:
            logps, refs = branches.sums(token_logps), self._references(ref_logps)
            result = self._mixed(None, logps, branches.lengths, refs, weights, betas, offsets)
            return self._output(result, branches.lengths, weights, num_pairs)

        return self._through_head(branches.rows_of(hidden), weight, branches.targets, branches.ends, bias, output_of)

    def logps(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:  # (2P,)
        """Branch log-probs of padded branches, chosen first, then rejected: what a reference contributes.

        Arguments as in `forward`; differentiable. Raises ValueError for shapes that do not fit.
        """
        _check_padded(hidden, labels)
        branches = _Branches(labels, token_weights)
        rows, ends = branches.rows_of(hidden), branches.ends
        return branches.sums(grouped_logprob(rows, weight, branches.targets, ends, bias=bias, **self._head_options()))

    def pairwise(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_of: Callable[[Tensor], tuple[Tensor, _T]],
        *,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> tuple[Tensor, _T]:
        """A loss of one's own on the branch log-probs, at the cost of this one: three head products for any R.

        Args:
            hidden, weight, labels, bias, token_weights: as in `forward`.
            loss_of: branch log-probs (2P,), chosen first, then rejected -> (scalar loss, anything else, without a
                gradient). The loss must be a sum over pairs, each term of the log-probs of its pair alone. It may be
                called several times, also with log-probs of 0 for all pairs but some.

        Returns what loss_of gives for all pairs; the loss is differentiable in hidden, weight and bias.

        Raises ValueError for shapes that do not fit.
        """
        _check_padded(hidden, labels)
        branches = _Branches(labels, token_weights)

        def of_tokens(token_logps: Tensor) -> tuple[Tensor, _T]:
            return loss_of(branches.sums(token_logps))

        rows, targets = branches.rows_of(hidden), branches.targets
        return linear_loss(rows, weight, targets, branches.ends, of_tokens, bias=bias, **self._head_options())

    def packed(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        batch: PackedBatch,
        ref_logps: Tensor | None = None,  # (2P,)
        *,
        bias: Tensor | None = None,
        num_pairs: float | None = None,
        betas: Tensor | None = None,  # (P,)
        offsets: Tensor | None = None,  # (P,)
        token_weights: Tensor | None = None,  # (R,)
    ) -> StepDPOOutput:
        """Loss of a packed forest, each pair weighted by its weight.

        Args:
            hidden: (T, D) of `packed_forward`.
            weight, bias, num_pairs, betas, offsets: as in `forward`.
            batch: the forest, on the same device.
            ref_logps: (2P,) branch log-probs of the reference in the batch's pair order, chosen first, then rejected.
            token_weights: (R,) of the batch's loss rows, otherwise as in `forward`; a row that several branches share
                has one weight.

        Raises ValueError as `forward` does.
        """
        if hidden.ndim != 2 or hidden.shape[0] != batch.num_tokens:
            raise ValueError(f"hidden must be ({batch.num_tokens}, D), got {tuple(hidden.shape)}")
        self._check(batch.num_pairs, ref_logps, betas=betas, offsets=offsets)
        factors = None if token_weights is None else _token_weights(token_weights, batch.targets.shape)
        refs, pairs = self._references(ref_logps), (batch.branches, batch.chosen, batch.rejected)
        lengths = None
        if self.rpo_alpha or any(kind in (*LENGTH_NORMALISED, "sft") for kind in self.mixture):
            lengths = batch.branches.lengths  # (S,)
            if factors is not None:
                lengths = sum_rows(factors.double(), batch.branches)
            lengths = torch.cat([lengths[batch.chosen], lengths[batch.rejected]])

        def output_of(token_logps: Tensor) -> StepDPOOutput:
            token_logps = _weighted(token_logps, factors)
            first = None
            if next(iter(self.mixture)) == "sigmoid" and betas is None and offsets is None:
                first = pair_loss(
                    token_logps, *pairs, refs, batch.weights, beta=self.beta, label_smoothing=self.label_smoothing
                )
            logps = pair_loss(token_logps, *pairs).logps if first is None else first.logps
            result = self._mixed(first, logps, lengths, refs, batch.weights, betas, offsets)
            return self._output(result, lengths, batch.weights, num_pairs)

        rows = gather_rows(hidden, batch.rows)
        return self._through_head(rows, weight, batch.targets, batch.group_ends, bias, output_of)

    def packed_logps(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        *,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:  # (2P,)
        """Branch log-probs of a packed forest, chosen first, then rejected: what a reference contributes."""
        rows, ends = gather_rows(hidden, batch.rows), batch.group_ends
        token_logps = grouped_logprob(rows, weight, batch.targets, ends, bias=bias, **self._head_options())
        factors = None if token_weights is None else _token_weights(token_weights, batch.targets.shape)
        return pair_loss(_weighted(token_logps, factors), batch.branches, batch.chosen, batch.rejected).logps

    def _through_head(
        self,
        rows: Tensor,  # (R, D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (R,)
        ends: Ends,
        bias: Tensor | None,
        output_of: Callable[[Tensor], StepDPOOutput],
    ) -> StepDPOOutput:
        """`output_of` the rows' log-probs (R,), of which a pair has those between two of `ends`."""

        def loss_of(token_logps: Tensor) -> tuple[Tensor, StepDPOOutput]:
            output = output_of(token_logps)
            return output.loss, output

        loss, output = linear_loss(rows, weight, targets, ends, loss_of, bias=bias, **self._head_options())
        return output._replace(loss=loss)

    def _head_options(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale, "impl": self.impl}

    def _check(self, pairs: int, ref_logps: Tensor | None, **per_pair: Tensor | None) -> None:
        if ref_logps is not None and not self._has_reference:
            raise ValueError(f"loss_type {self.loss_type!r} has no reference: leave ref_logps out")
        if not self.reference_free:
            if ref_logps is None:
                raise ValueError(
                    "ref_logps is missing: pass the reference's branch log-probs, or set reference_free=True"
                )
            if ref_logps.shape != (2 * pairs,):
                raise ValueError(
                    f"ref_logps must be ({2 * pairs},), chosen then rejected, got {tuple(ref_logps.shape)}"
                )
        for name, values in per_pair.items():
            if values is not None and values.shape != (pairs,):
                raise ValueError(f"{name} must be ({pairs},), one for each pair, got {tuple(values.shape)}")
        if per_pair["offsets"] is not None:
            if "ipo" in self.mixture:
                raise ValueError("offsets: 'ipo' has a target margin of its own, 1 / (2 beta); pass betas instead")
            if [*self.mixture] == ["sft"]:
                raise ValueError("offsets: 'sft' has no margin to take them from; leave them out")
        betas = per_pair["betas"]
        if betas is not None:
            in_range = ((betas > 0) & betas.isfinite()).all()
            if betas.device.type != "cpu":
                torch._assert_async(in_range, "betas must be positive and finite")
            elif not in_range:
                raise ValueError(f"betas must be positive and finite, got {betas.tolist()}")

    def _references(self, ref_logps: Tensor | None) -> Tensor | None:
        return None if self.reference_free else ref_logps

    def _mixed(
        self,
        first: PairLoss | None,
        logps: Tensor,  # (2P,)
        lengths: Tensor | None,  # (2P,), for losses per token
        ref_logps: Tensor | None,  # (2P,)
        weights: Tensor | None,  # (P,)
        betas: Tensor | None,  # (P,)
        offsets: Tensor | None,  # (P,)
    ) -> PairLoss:
        """The types' losses, weighted and added up; all else is of the first type, which may be there already."""
        (kind, factor), *others = self.mixture.items()
        inputs = (logps, lengths, ref_logps, weights, betas, offsets)
        if first is None:
            first = self._pair_losses(kind, *inputs)
        losses = first.losses if factor == 1 else factor * first.losses
        for kind, factor in others:
            losses = losses + factor * self._pair_losses(kind, *inputs).losses
        return first._replace(losses=losses)

    def _pair_losses(
        self,
        kind: str,
        logps: Tensor,  # (2P,)
        lengths: Tensor | None,  # (2P,), for losses per token
        ref_logps: Tensor | None,  # (2P,)
        weights: Tensor | None,  # (P,)
        betas: Tensor | None,  # (P,)
        offsets: Tensor | None,  # (P,)
    ) -> PairLoss:
        beta = self.beta if betas is None else betas.detach().to(logps.dtype)
        if kind in REFERENCE_FREE:
            ref_logps = None
        ratios = logps if ref_logps is None else logps - ref_logps.detach().to(logps.dtype)
        if kind in LENGTH_NORMALISED:
            assert lengths is not None
            ratios = per_token(ratios, lengths)
        chosen_rewards, rejected_rewards = (beta * ratio for ratio in ratios.chunk(2))
        margins = chosen_rewards - rejected_rewards
        if kind == "sft":
            assert lengths is not None
            losses = -per_token(logps, lengths)[: margins.shape[0]]
        else:
            losses = pair_losses(
                kind,
                margins,
                beta=beta,
                label_smoothing=self.label_smoothing,
                simpo_gamma=self.simpo_gamma,
                offsets=None if offsets is None else offsets.detach().to(logps.dtype),
            )
        if weights is not None:
            losses = weights.detach().to(losses.dtype) * losses
        return PairLoss(losses, logps, chosen_rewards.detach(), rejected_rewards.detach(), margins.detach())

    def _output(
        self,
        result: PairLoss,
        lengths: Tensor | None,  # (2P,), for rpo_alpha
        weights: Tensor | None,  # (P,)
        num_pairs: float | None,
    ) -> StepDPOOutput:
        losses, pairs = result.losses, result.losses.shape[0]
        chosen, rejected = result.logps.chunk(2)
        if self.rpo_alpha:
            assert lengths is not None
            nll = -self.rpo_alpha * per_token(chosen, lengths[:pairs])
            losses = losses + (nll if weights is None else weights.detach().to(nll.dtype) * nll)
        return StepDPOOutput(
            loss=losses.sum() / (max(pairs, 1) if num_pairs is None else num_pairs),
            chosen_logps=chosen.detach(),
            rejected_logps=rejected.detach(),
            chosen_rewards=result.chosen_rewards,
            rejected_rewards=result.rejected_rewards,
            margins=result.margins,
            accuracy=(result.margins > 0).to(torch.float32),
        )

    def extra_repr(self) -> str:
        shown = f"beta={self.beta}, loss_type={self.loss_type!r}, label_smoothing={self.label_smoothing}"
        if self.loss_weights is not None:
            shown += f", loss_weights={self.loss_weights}"
        if self.rpo_alpha:
            shown += f", rpo_alpha={self.rpo_alpha}"
        return shown if self.simpo_gamma is None else f"{shown}, simpo_gamma={self.simpo_gamma}"


def _check_padded(hidden: Tensor, labels: Tensor) -> None:
    if hidden.ndim != 3 or hidden.shape[0] % 2 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden must be (2P, L, D) and labels (2P, L), got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )


class _Branches:
    """The labelled tokens of padded branches as R rows, pair after pair: a pair's chosen branch, then its rejected one.

    targets:  (R,)
    lengths:  (2P,) of the branches, chosen first, weighted as their tokens are
    """

    def __init__(self, labels: Tensor, token_weights: Tensor | None) -> None:
        by_pair = torch.arange(labels.shape[0], device=labels.device).view(2, -1).T  # (P, 2) branches
        labelled = labels != -100  # (2P, L)
        self._keep = labelled[by_pair]  # (P, 2, L)
        pair, side, self._columns = self._keep.nonzero(as_tuple=True)
        self._branches = by_pair[pair, side]
        self.targets = labels[self._branches, self._columns]
        counts = labelled.sum(dim=1)  # (2P,)
        self._rows_of_pair = counts.view(2, -1).sum(dim=0)  # (P,)
        self.lengths, self._factors = counts, None
        if token_weights is not None:
            factors = _token_weights(token_weights, labels.shape)
            self.lengths = factors.masked_fill(~labelled, 0).sum(dim=1, dtype=torch.float64)
            self._factors = factors[self._branches, self._columns]

    def ends(self) -> list[int]:
        """After how many rows each pair ends."""
        ends: list[int] = self._rows_of_pair.cumsum(dim=0).tolist()
        return ends

    def rows_of(self, hidden: Tensor) -> Tensor:  # (2P, L, D) -> (R, D)
        return hidden[self._branches, self._columns]

    def sums(self, token_logps: Tensor) -> Tensor:  # (R,) -> (2P,)
        """Log-probs of the branches, chosen first."""
        token_logps = _weighted(token_logps, self._factors)
        table = token_logps.new_zeros(self._keep.shape).masked_scatter(self._keep, token_logps)
        return table.sum(dim=2, dtype=torch.float64).to(table.dtype).T.flatten()


def _weighted(token_logps: Tensor, factors: Tensor | None) -> Tensor:
    return token_logps if factors is None else token_logps * factors.to(token_logps.dtype)


def _token_weights(values: Tensor, shape: torch.Size) -> Tensor:
    if values.shape != shape:
        raise ValueError(f"token_weights must be {tuple(shape)}, got {tuple(values.shape)}")
    return values.detach()
