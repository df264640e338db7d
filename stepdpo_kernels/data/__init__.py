"""Records on disk or on the hub -> `StepPair`."""

from __future__ import annotations

from stepdpo_kernels.data.dataset import LoadReport, StepPairDataset, check_vocabulary
from stepdpo_kernels.data.load import load_step_pairs, why_unfit
from stepdpo_kernels.data.records import RawRecord, check_record
from stepdpo_kernels.data.tokenization import StepTokenizer

__all__ = [
    "LoadReport",
    "RawRecord",
    "StepPairDataset",
    "StepTokenizer",
    "check_record",
    "check_vocabulary",
    "load_step_pairs",
    "why_unfit",
]
