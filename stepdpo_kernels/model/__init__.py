"""Transformers models on packed forests."""

from stepdpo_kernels.model.forward import disable_packed_forward, enable_packed_forward, packed_forward
from stepdpo_kernels.model.support import SUPPORTED_MODEL_TYPES, causal_lm, check_supported, why_not

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "causal_lm",
    "check_supported",
    "disable_packed_forward",
    "enable_packed_forward",
    "packed_forward",
    "why_not",
]
