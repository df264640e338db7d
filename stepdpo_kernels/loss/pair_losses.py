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
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdpo_kernels.ops.pair_loss import logistic_loss

LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo", "simpo")
LENGTH_NORMALISED = ("ipo", "simpo")
REFERENCE_FREE = ("simpo",)
SIMPO_GAMMA = 0.5  # of SimPO where none is given, as in TRL


def check_options(
    beta: float, loss_type: str, label_smoothing: float, rpo_alpha: float, simpo_gamma: float | None
) -> None:
    """Raises ValueError for a value outside its range, or an option that the loss has no place for, by name."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if loss_type == "robust" and not label_smoothing:
        raise ValueError("loss_type 'robust' needs label_smoothing, the share of wrong preferences, in (0, 0.5)")
    if loss_type in ("hinge", "ipo") and label_smoothing:
        raise ValueError(f"loss_type {loss_type!r} has no label_smoothing, got {label_smoothing}: leave it out")
    if not 0 <= rpo_alpha < float("inf"):
        raise ValueError(f"rpo_alpha must be finite and >= 0, got {rpo_alpha}")
    if simpo_gamma is not None:
        if loss_type != "simpo":
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
    """The loss of each pair from its margin, see the head of this file.

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
