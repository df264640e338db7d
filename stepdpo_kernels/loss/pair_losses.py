"""Pair losses as functions of margins (P,), and what each of them takes.

With h the difference of the two branches' log-ratios to the reference, a margin is x = beta * h. `LENGTH_NORMALISED`
losses take the log-ratio of a branch per token, that is divided by its length, or by 1 where that is 0: an empty
branch contributes 0, and no NaN. With e = label_smoothing:

    sigmoid  -(1 - e) log sigmoid(x) - e log sigmoid(-x)
             DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7), Step-DPO (Lai et al. 2024, arXiv 2406.18629,
             equation 2); e > 0 is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences")
    robust   (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e)
             robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): in expectation over preferences of which a share e
             is the wrong way round, the loss of the clean ones. Not bounded below: -e x / (1 - 2e) for large x
    hinge    max(0, 1 - x)
             SLiC (Zhao et al. 2023, arXiv 2305.10425) with DPO's margin (Liu et al. 2023, arXiv 2309.06657)
    ipo      (h - 1 / (2 beta))^2, h per token
             IPO (Azar et al. 2023, arXiv 2310.12036, equation 17, where beta is called tau); per token as TRL does, on
             the word of its authors
    simpo    as sigmoid at x - gamma, with log-probs per token in place of log-ratios: no reference
             SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6, where e = 0)
    sft      -(log-prob of the chosen branch) / (its length): no margin, no reference
             The negative log-likelihood of RPO (Pang et al. 2024, arXiv 2404.19733, equation 1). A mean over pairs of
             a mean over tokens, so that it does not depend on how pairs are split; TRL's "sft" is a mean over all
             chosen tokens of a micro-batch, which is the same where its chosen branches are of one length

A mixture is the sum of several types, each with a weight of its own and its own margins from the same log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from stepdpo_kernels.ops.pair_loss import logistic_loss

LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo", "simpo", "sft")
LENGTH_NORMALISED = ("ipo", "simpo")
REFERENCE_FREE = ("simpo", "sft")
SMOOTHED = ("sigmoid", "robust", "simpo")
SIMPO_GAMMA = 0.5  # of SimPO where none is given, as in TRL


def mixture_of(loss_type: str | Sequence[str], loss_weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each type, "sft" last: 1 unless given.

    Raises ValueError, by field and value, for no type, one that is unknown or named twice, and for weights that are not
    one for each type, finite, >= 0 and not all 0.
    """
    types = [loss_type] if isinstance(loss_type, str) or not isinstance(loss_type, Sequence) else list(loss_type)
    if not types:
        raise ValueError(f"loss_type must name at least one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    for kind in types:
        if kind not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {kind!r}")
        if types.count(kind) > 1:
            raise ValueError(f"loss_type names {kind!r} twice, got {types}: give it one weight")
    if loss_weights is None:
        loss_weights = [1.0] * len(types)
    if not isinstance(loss_weights, Sequence) or len(loss_weights) != len(types):
        raise ValueError(f"loss_weights must be one number for each loss_type of {types}, got {loss_weights!r}")
    for kind, factor in zip(types, loss_weights, strict=True):
        if not isinstance(factor, Real) or not 0 <= factor < float("inf"):
            raise ValueError(f"loss_weights must be finite and >= 0, got {factor!r} for loss_type {kind!r}")
    if not any(loss_weights):
        raise ValueError(f"loss_weights must not all be 0, got {loss_weights!r}")
    mixture = {kind: float(factor) for kind, factor in zip(types, loss_weights, strict=True)}
    return dict(sorted(mixture.items(), key=lambda item: item[0] == "sft"))


def check_options(
    beta: float,
    loss_type: str | Sequence[str],
    mixture: dict[str, float],
    label_smoothing: float,
    rpo_alpha: float,
    simpo_gamma: float | None,
) -> None:
    """Raises ValueError for a value outside its range, or an option that no type has a place for, by name."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if "robust" in mixture and not label_smoothing:
        raise ValueError("loss_type 'robust' needs label_smoothing, the share of wrong preferences, in (0, 0.5)")
    if label_smoothing and not any(kind in SMOOTHED for kind in mixture):
        raise ValueError(f"loss_type {loss_type!r} has no label_smoothing, got {label_smoothing}: leave it out")
    if not 0 <= rpo_alpha < float("inf"):
        raise ValueError(f"rpo_alpha must be finite and >= 0, got {rpo_alpha}")
    if simpo_gamma is not None:
        if "simpo" not in mixture:
            raise ValueError(f"simpo_gamma is for loss_type 'simpo', got {simpo_gamma} with {loss_type!r}")
        if not 0 <= simpo_gamma < float("inf"):
            raise ValueError(f"simpo_gamma must be finite and >= 0, got {simpo_gamma}")


def pair_losses(
    loss_type: str,
    margins: Tensor,  # (P,)
    *,
    beta: float | Tensor,  # (P,) where each pair has its own
    label_smoothing: float = 0.0,
    simpo_gamma: float | None = None,
    offsets: Tensor | None = None,  # (P,)
) -> Tensor:  # (P,)
    """The loss of each pair from its margin, see the head of this file; "sft" has none.

    offsets: (P,) subtracted from the margins: a target that a pair must exceed, in units of reward. With "sigmoid"
        this is ODPO, -log sigmoid(x - offset) (Amini et al. 2024, arXiv 2402.10571).
    """
    if offsets is not None:
        margins = margins - offsets
    if loss_type == "sigmoid":
        return logistic_loss(margins, label_smoothing)
    if loss_type == "simpo":
        return logistic_loss(margins - (SIMPO_GAMMA if simpo_gamma is None else simpo_gamma), label_smoothing)
    if loss_type == "robust":
        right, wrong = logistic_loss(margins), logistic_loss(-margins)
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return torch.relu(1 - margins)
    return ((margins - 0.5) / beta) ** 2  # ipo: x / beta is h


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """logps / lengths, where a length of 0 counts as 1: the sum over no tokens is 0 already."""
    return logps / lengths.masked_fill(lengths == 0, 1).to(logps.dtype)
