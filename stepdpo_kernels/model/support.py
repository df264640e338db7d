"""Which models can run on a packed forest, and every reason why another cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stepdpo_kernels.types import StepDPOError

# Architectures (`config.model_type`) whose packed gradients are tested against the unpacked model's. Others may be
# run after `verify_first_batch` has compared them.
SUPPORTED_MODEL_TYPES = (
    "cohere",
    "cohere2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Modules that carry a state from one token to the next in packed order, whatever the tree.
_CARRIES_STATE = re.compile(
    r"(Mamba|ShortConv|DeltaNet|LightningAttention|LinearAttention|RetNet|Rwkv|RgLru|RGLRU|mLSTM|sLSTM|SSM|xLSTM)"
    r"(?!.*Norm)"
)
_DROPOUTS = (
    *("attention_dropout", "attn_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
    *("residual_dropout", "resid_pdrop", "hidden_dropout", "hidden_dropout_prob"),
    *("embedding_dropout", "embd_pdrop"),
)


def _unwrapped(model: Any) -> Any:
    """What DistributedDataParallel and its like wrap."""
    while hasattr(model, "module"):
        model = model.module
    return model


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers causal language model inside DDP's, accelerate's or PEFT's wrappers."""
    model = _unwrapped(model)
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise StepDPOError(f"model: expected a transformers causal language model, got {type(model).__name__}")
    return model


def is_tested(model: Any) -> bool:
    """Whether packed gradients of this architecture are compared with the unpacked model's in the tests.

    A class of somebody else's is not, whatever its `model_type`.
    """
    lm = causal_lm(model)
    own = next(c for c in type(lm).__mro__ if not c.__module__.startswith("torch."))  # FSDP2 puts a class before it
    return lm.config.model_type in SUPPORTED_MODEL_TYPES and own.__module__.startswith("transformers.")


def why_not(model: Any) -> list[str]:
    """Every reason why this model cannot be run on a packed forest; empty if nothing speaks against it.

    An architecture that is not in SUPPORTED_MODEL_TYPES is no reason: `verify_first_batch` decides.
    """
    lm = causal_lm(model)
    config = lm.config
    reasons = []
    adapter: Any = getattr(_unwrapped(model), "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        reasons.append(
            f"{adapter.peft_type.value} puts virtual tokens before every text, which packing would "
            "leave out: use an adapter of the weights, such as LoRA"
        )
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder")
    if "text_config" in getattr(config, "sub_configs", ()):
        reasons.append(f"a {config.model_type} takes more than text: load its language model alone")
    head = lm.get_output_embeddings()
    if head is None:
        reasons.append(f"{type(lm).__name__} has no language-model head")
    elif not isinstance(head, nn.Linear):
        reasons.append(
            f"its language-model head is a {type(head).__name__}, of which the loss would use the weight alone: take "
            "lm_head out of the adapter's target_modules and modules_to_save"
        )
    elif not head.weight.is_floating_point():
        reasons.append(
            f"its language-model head is quantised to {head.weight.dtype}, and the loss reads its weight: leave it out "
            "of the quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    return reasons + _mixers(lm) + _attention(config)


def _mixers(lm: PreTrainedModel) -> list[str]:
    """Reasons in what mixes tokens beside attention, or in its place."""
    reasons = []
    stateful = {
        type(module).__name__
        for module in lm.base_model.modules()
        if isinstance(module, nn.Conv1d | nn.RNNBase)
        or (_CARRIES_STATE.search(type(module).__name__) and not isinstance(module, PreTrainedModel))
    }
    if stateful:
        reasons.append(f"{', '.join(sorted(stateful))} would carry state from one branch into the next")
    foreign = sorted(set(getattr(lm.config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    if foreign:
        reasons.append(f"it has layers of type {', '.join(foreign)}; only {', '.join(_LAYER_TYPES)} follow the paths")
    if not _calls_the_interface(lm):
        reasons.append(f"{type(lm).__name__} does not call its attention through transformers' AttentionInterface")
    return reasons


def _calls_the_interface(lm: PreTrainedModel) -> bool:
    """Whether the file of the model's layers does, which for a class derived from transformers' is transformers'."""
    classes: list[Any] = [c for c in type(lm).__mro__ if c.__module__.startswith("transformers.models.")]
    try:
        return (*classes, type(lm))[0]._can_set_attn_implementation()
    except (AttributeError, KeyError):  # transformers before 5.6, of a class without a file
        return False


def _attention(config: Any) -> list[str]:
    """Reasons in how attention is computed."""
    reasons = []
    if getattr(config, "attention_chunk_size", None):
        reasons.append(f"its attention is chunked (attention_chunk_size is {config.attention_chunk_size})")
    if getattr(config, "index_topk", None):
        reasons.append(f"its attention selects keys with an indexer (index_topk is {config.index_topk})")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        reasons.append("its attention adds a bias that depends on positions (alibi)")
    if getattr(config, "attn_logit_softcapping", None) and (config._attn_implementation or "").endswith("sdpa"):
        reasons.append(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}, which its attention 'sdpa' leaves out: load "
            "it with attn_implementation='eager'"
        )
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        reasons.append("its attention is not causal")
    for name in _DROPOUTS:
        if getattr(config, name, None):
            reasons.append(f"{name} is {getattr(config, name)}; set it to 0.0 (Step-DPO trains without dropout)")
    return reasons


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Those of all layers, or of each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    yield from (part for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part)


def max_path(config: Any) -> int | None:
    """The longest branch, in tokens, for which a packed forest is exact; None where there is no such bound.

    Rotary embeddings of type "dynamic" and "longrope" change for all tokens of a batch once one of its positions lies
    beyond the length that the model was first trained on, so that a branch would depend on its neighbours.
    """
    bounds = []
    for rope in _rope_parameters(config):
        if rope["rope_type"] == "longrope":
            bounds.append(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        elif rope["rope_type"] == "dynamic":
            bounds.append(config.max_position_embeddings)
    return min(bounds, default=None)


def check_supported(model: Any) -> None:
    """Raises StepDPOError with every reason when the model cannot be run on a packed forest."""
    reasons = why_not(model)
    if reasons:
        raise StepDPOError(f"model {type(causal_lm(model)).__name__} cannot be packed: {'; '.join(reasons)}")
