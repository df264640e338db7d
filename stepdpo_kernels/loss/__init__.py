"""Pair losses on branch log-probs."""

from stepdpo_kernels.loss.pair_losses import LOSS_TYPES
from stepdpo_kernels.loss.step_dpo import StepDPOLoss, StepDPOOutput

__all__ = ["LOSS_TYPES", "StepDPOLoss", "StepDPOOutput"]
