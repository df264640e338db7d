"""Records on disk or on the hub -> `StepPair`."""

from __future__ import annotations

from stepdpo_kernels.data.dataset import LoadReport, StepPairDataset, check_vocabulary
from stepdpo_kernels.data.load import load_step_pairs

__all__ = ["LoadReport", "StepPairDataset", "check_vocabulary", "load_step_pairs"]
