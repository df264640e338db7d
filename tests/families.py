"""The families of models that are supported: one list, from which tests and the README's table are made.

`python -m tests.families` prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, and a small configuration of it that has everything it is known for.

    prefix:   of the classes in transformers: `{prefix}Config`, `{prefix}ForCausalLM`
    models:   what people know it by
    special:  what packing must get right there, beside full causal attention
    config:   fields beside those that tiny_model gives every model
    """

    prefix: str
    models: str
    special: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    config_class: str = ""


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ALTERNATING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# by `config.model_type`
FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        "Qwen2",
        "Qwen2, Qwen2.5, Qwen1.5",
        "sliding window",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        "Qwen2-57B-A14B, Qwen1.5-MoE",
        "experts, sliding window",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "llama": Family(
        "Llama", "Llama 2 and 3, DeepSeekMath, SmolLM2", "Llama 3's rotary scaling", {"rope_parameters": LLAMA3}
    ),
    "qwen3": Family("Qwen3", "Qwen3", "", {"head_dim": 16}),
    "qwen3_moe": Family("Qwen3Moe", "Qwen3-30B-A3B and larger", "experts", {**EXPERTS, "head_dim": 16}),
    "mistral": Family("Mistral", "Mistral 7B", "sliding window", {"sliding_window": 7}),
    "mixtral": Family("Mixtral", "Mixtral", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": Family("Gemma", "Gemma", "scaled embeddings", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": Family(
        "Gemma2",
        "Gemma 2",
        "softcaps of scores and logits, alternating window",
        {
            **ALTERNATING,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3",
        "Gemma 3 (text)",
        "alternating window, a rotary base for each",
        {**ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 24},
        config_class="Gemma3TextConfig",
    ),
    "phi3": Family(
        "Phi3",
        "Phi-3, Phi-4",
        "sliding window, partial and long rotary",
        {
            "sliding_window": 7,
            "original_max_position_embeddings": 1024,
            "rope_parameters": LONG,
            "partial_rotary_factor": 0.5,  # where transformers 5.0 looks for it
        },
    ),
    "olmo": Family("Olmo", "OLMo", "clipped queries, keys and values", {"clip_qkv": 1.0}),
    "olmo2": Family("Olmo2", "OLMo 2"),
    "olmo3": Family("Olmo3", "OLMo 3", "alternating window", ALTERNATING),
    "deepseek_v3": Family(
        "DeepseekV3",
        "DeepSeek-V3, R1, Moonlight",
        "latent attention with heads of unequal size, experts",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "num_mtp_layers": 0,
        },
    ),
    "smollm3": Family("SmolLM3", "SmolLM3", "layers without positions", {"no_rope_layers": [1, 0]}),
    "gpt_oss": Family(
        "GptOss",
        "gpt-oss",
        "attention sinks, alternating window, experts",
        {
            **ALTERNATING,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "granite": Family(
        "Granite",
        "Granite 3",
        "multipliers, divided logits",
        {
            "logits_scaling": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "embedding_multiplier": 2.0,
        },
    ),
    "cohere": Family(
        "Cohere", "Command R", "scaled logits, parallel blocks", {"logit_scale": 0.25, "use_qk_norm": True}
    ),
    "cohere2": Family(
        "Cohere2", "Command R7B", "scaled logits, alternating window", {**ALTERNATING, "logit_scale": 0.25}
    ),
    "starcoder2": Family("Starcoder2", "StarCoder2", "sliding window", {"sliding_window": 7}),
}


def tiny_model(
    kind: str = "llama",
    *,
    vocab_size: int = 512,
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> PreTrainedModel:
    """A new small random model, the same for the same arguments.

    kind is one of FAMILIES, in its plainest form: pass `**FAMILIES[kind].config` for what it is known for. Hidden size
    64, 4 heads over 2 key-value heads, an untied head, in eval mode. The weights are larger than transformers'
    initialisation, so that logits differ clearly between tokens. `config` overrides any field of the model's config.
    """
    import transformers

    family = FAMILIES[kind]
    config_class = getattr(transformers, family.config_class or f"{family.prefix}Config")
    model_class = getattr(transformers, f"{family.prefix}ForCausalLM")
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    model_config: Any = config_class(**{**settings, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = model_class(model_config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                else:  # norms around 1, biases around 0
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if kind == "gemma2":  # SDPA has no softcap, which transformers before 5.17 passes over
        model.set_attn_implementation("eager")
    return model.to(dtype).eval()


def attention_inputs(kind: str) -> list[dict[str, Any]]:
    """What tree attention is given by each layer of a family's model, in bfloat16."""
    from stepdpo_kernels.model import attention, packed_forward
    from stepdpo_kernels.packing import build_batch
    from tests.forests import nested_pairs

    seen = []
    tree_attention: Any = vars(attention)["tree_attention"]

    def watched(query: Any, key: Any, value: Any, plan: Any, *, scale: float, **options: Any) -> Any:
        seen.append({"query": query, "key": key, "value": value, "plan": plan, **options})
        return tree_attention(query, key, value, plan, scale=scale, **options)

    model = tiny_model(kind, dtype=torch.bfloat16, **FAMILIES[kind].config)
    with torch.no_grad(), patch.object(attention, "tree_attention", watched):
        packed_forward(model, build_batch(nested_pairs(), [0], "tree"))
    return seen


def varlen_takes(kind: str) -> bool:
    """Whether PyTorch's variable-length attention would take all layers of a family on a GPU."""
    from stepdpo_kernels.ops.tree_attention import varlen

    def on_a_gpu(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype, shape=x.shape)

    return not any(varlen.why_not({k: on_a_gpu(x) for k, x in layer.items()}) for layer in attention_inputs(kind))


def table() -> str:
    """The README's table of families."""
    lines = ["| `model_type` | for example | what packing has to get right | `varlen` |", "|---|---|---|---|"]
    for kind, family in FAMILIES.items():
        takes = "yes" if varlen_takes(kind) else "no"
        lines.append(f"| `{kind}` | {family.models} | {family.special} | {takes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
