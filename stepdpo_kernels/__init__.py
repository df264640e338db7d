"""Step-DPO training: exact, with every shared prefix encoded once and no logits in memory.

The names below are the public interface. They load on first use, so that importing the package costs little and
needs neither transformers nor triton nor the C++ extension.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepdpo_kernels._dispatch import use_impl
    from stepdpo_kernels.data import load_step_pairs
    from stepdpo_kernels.loss import StepDPOLoss, StepDPOOutput
    from stepdpo_kernels.model import packed_forward
    from stepdpo_kernels.ops.linear_logprob import linear_logprob
    from stepdpo_kernels.packing import pack_pairs
    from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer
    from stepdpo_kernels.types import PackedBatch, StepDPOError, StepPair

__version__ = "0.1.0"

_HOME = {
    "PackedBatch": "types",
    "StepDPOConfig": "trainer",
    "StepDPOError": "types",
    "StepDPOLoss": "loss",
    "StepDPOOutput": "loss",
    "StepDPOTrainer": "trainer",
    "StepPair": "types",
    "linear_logprob": "ops.linear_logprob",
    "load_step_pairs": "data",
    "pack_pairs": "packing",
    "packed_forward": "model",
    "use_impl": "_dispatch",
}

__all__ = [
    "PackedBatch",
    "StepDPOConfig",
    "StepDPOError",
    "StepDPOLoss",
    "StepDPOOutput",
    "StepDPOTrainer",
    "StepPair",
    "linear_logprob",
    "load_step_pairs",
    "pack_pairs",
    "packed_forward",
    "use_impl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
