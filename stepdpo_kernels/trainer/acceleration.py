"""Faster layers from elsewhere, under this package's attention and head: Liger's kernels and torch.compile."""

from __future__ import annotations

from typing import Any

from transformers.integrations.liger import apply_liger_kernel

from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.trainer.config import StepDPOConfig
from stepdpo_kernels.types import StepDPOError

# What Liger would put in the place of the head and its loss.
_HEADS = ("cross_entropy", "fused_linear_cross_entropy")


def accelerate_layers(model: Any, args: StepDPOConfig) -> None:
    """Applies what `use_liger_kernel` and `torch_compile` ask for, once for policy and reference alike.

    Before `enable_packed_forward`. Raises StepDPOError where Liger has nothing for the model or the device.
    """
    if args.use_liger_kernel:
        _check_liger(model, args)
        # Trainer applies it again before training, with the same settings
        args.liger_kernel_config = (args.liger_kernel_config or {}) | dict.fromkeys(_HEADS, False)
        apply_liger_kernel(model, args.liger_kernel_config)
    if args.torch_compile:
        for layer in layers(model):
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def layers(model: Any) -> list[Any]:
    """The decoder layers of a transformers model, each of which is compiled on its own, into one graph for all."""
    lm = causal_lm(model)
    return [module for module in lm.modules() if type(module).__name__ in (lm._no_split_modules or ())]


def _check_liger(model: Any, args: StepDPOConfig) -> None:
    asked = [name for name in _HEADS if (args.liger_kernel_config or {}).get(name)]
    if asked:
        raise StepDPOError(
            f"liger_kernel_config: {', '.join(asked)} would replace this package's head and loss: leave it out"
        )
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise StepDPOError(f"use_liger_kernel: {error}: pip install liger-kernel") from None
    kind = causal_lm(model).config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise StepDPOError(f"use_liger_kernel: liger-kernel has nothing for {kind}: leave it out")
    if args.device.type == "cpu":
        raise StepDPOError("use_liger_kernel: its Triton kernels need a GPU: leave it out")
