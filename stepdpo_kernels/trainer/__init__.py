"""The trainer: transformers' Trainer on packed step pairs."""

from stepdpo_kernels.trainer.config import StepDPOConfig
from stepdpo_kernels.trainer.loading import load_model, load_tokenizer
from stepdpo_kernels.trainer.trainer import StepDPOTrainer

__all__ = ["StepDPOConfig", "StepDPOTrainer", "load_model", "load_tokenizer"]
