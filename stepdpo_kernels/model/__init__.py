"""Transformers models on packed forests."""

from stepdpo_kernels.model.forward import disable_packed_forward, enable_packed_forward, packed_forward, verify_once
from stepdpo_kernels.model.head import head_options
from stepdpo_kernels.model.padded import PaddedLogps, padded_logps
from stepdpo_kernels.model.support import (
    SUPPORTED_MODEL_TYPES,
    causal_lm,
    check_supported,
    is_tested,
    max_path,
    why_not,
)
from stepdpo_kernels.model.verify import verify_first_batch
from stepdpo_kernels.model.versions import require_transformers

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "PaddedLogps",
    "causal_lm",
    "check_supported",
    "disable_packed_forward",
    "enable_packed_forward",
    "head_options",
    "is_tested",
    "max_path",
    "packed_forward",
    "padded_logps",
    "require_transformers",
    "verify_first_batch",
    "verify_once",
    "why_not",
]
