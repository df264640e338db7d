"""Branch sums, margins and the Step-DPO loss of pairs from token log-probs; see README.md beside this file."""

from stepdpo_kernels.ops.pair_loss.api import pair_loss
from stepdpo_kernels.ops.pair_loss.reference import PairLoss, logistic_loss

__all__ = ["PairLoss", "logistic_loss", "pair_loss"]
