"""Which models can run on a packed forest, and every reason why another cannot."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stepdpo_kernels.types import StepDPOError

# Architectures (`config.model_type`) whose packed gradients are tested against the unpacked model's.
SUPPORTED_MODEL_TYPES = ("llama", "qwen2")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# These scale positions by the longest one in the batch, which packing changes.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers causal language model inside DDP's, accelerate's or PEFT's wrappers."""
    while hasattr(model, "module"):  # DistributedDataParallel and its like
        model = model.module
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise StepDPOError(f"model: expected a transformers causal language model, got {type(model).__name__}")
    return model


def why_not(model: Any) -> list[str]:
    """Every reason why this model cannot be run on a packed forest; empty if it can."""
    lm = causal_lm(model)
    config = lm.config
    reasons = []
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        reasons.append(
            f"its model_type {config.model_type!r} is not one whose packed gradients are tested "
            f"({', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        reasons.append(
            f"{model.active_peft_config.peft_type.value} puts virtual tokens before every text, which packing would "
            "leave out: use an adapter of the weights, such as LoRA"
        )
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder")
    head = lm.get_output_embeddings()
    if head is None:
        reasons.append(f"{type(lm).__name__} has no language-model head")
    elif not isinstance(head, nn.Linear):
        reasons.append(
            f"its language-model head is a {type(head).__name__}, of which the loss would use the weight alone: take "
            "lm_head out of the adapter's target_modules and modules_to_save"
        )
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    if foreign:
        reasons.append(f"it has layers of type {', '.join(foreign)}; only {', '.join(_LAYER_TYPES)} follow the paths")
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type in _BATCH_DEPENDENT_ROPE:
        reasons.append(f"its rotary embedding ({rope_type!r}) depends on the longest position in the batch")
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        reasons.append(f"attention_dropout is {dropout}; set it to 0.0 (Step-DPO trains without dropout)")
    return reasons


def check_supported(model: Any) -> None:
    """Raises StepDPOError with every reason when the model cannot be run on a packed forest."""
    reasons = why_not(model)
    if reasons:
        raise StepDPOError(f"model {type(causal_lm(model)).__name__} cannot be packed: {'; '.join(reasons)}")
