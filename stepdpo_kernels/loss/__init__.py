"""Pair losses on branch log-probs."""

from stepdpo_kernels.loss.step_dpo import LOSS_TYPES, StepDPOLoss, StepDPOOutput

__all__ = ["LOSS_TYPES", "StepDPOLoss", "StepDPOOutput"]
