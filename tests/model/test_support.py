"""Models that would be silently wrong are refused by name, with every reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from stepdpo_kernels.model import (
    SUPPORTED_MODEL_TYPES,
    causal_lm,
    check_supported,
    head_options,
    is_tested,
    packed_forward,
    why_not,
)
from stepdpo_kernels.model.forward import enable_packed_forward
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import StepDPOError
from tests.families import FAMILIES
from tests.forests import nested_pairs

Make = Callable[..., PreTrainedModel]


def test_supported_is_what_the_families_of_the_tests_are() -> None:
    assert sorted(FAMILIES) == list(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_supported(tiny_model: Make, kind: str) -> None:
    for model in (tiny_model(kind), tiny_model(kind, **FAMILIES[kind].config)):
        assert model.config.model_type == kind
        assert is_tested(model)
        assert why_not(model) == []
        check_supported(model)


def test_an_attention_that_leaves_out_the_softcap_is_refused(tiny_model: Make) -> None:
    model = tiny_model("gemma2")
    model.config._attn_implementation = "sdpa"  # which transformers before 5.17 takes of itself
    with pytest.raises(StepDPOError, match=r"attn_logit_softcapping is 50\.0, .*attn_implementation='eager'"):
        check_supported(model)


def test_a_class_without_a_file_calls_what_it_derives_from(tiny_model: Make) -> None:
    model: Any = tiny_model()
    model.__class__ = type("Mine", (type(model),), {"__module__": "a_notebook"})
    assert why_not(model) == []
    model.__class__ = type("Alone", (PreTrainedModel,), {"__module__": "a_notebook", "base_model_prefix": "model"})
    assert why_not(model) == ["Alone does not call its attention through transformers' AttentionInterface"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_head_options_give_the_models_logits(tiny_model: Make, kind: str) -> None:
    model = tiny_model(kind, **FAMILIES[kind].config)
    input_ids = torch.randint(3, 512, (1, 9))
    options = head_options(model)
    assert bool(options) == (kind in ("gemma2", "cohere", "cohere2", "granite"))
    logits = model.get_output_embeddings()(model.base_model(input_ids=input_ids).last_hidden_state)
    logits = logits * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    torch.testing.assert_close(logits, model(input_ids=input_ids).logits)


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_rotary_embeddings_that_look_at_the_position_alone(tiny_model: Make, rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert why_not(tiny_model(rope_parameters=parameters)) == []


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# model_type -> (fields of its config, what is said against it)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bamba": ({"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]}, "Conv1d would carry state"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "does not call its attention through transformers' AttentionInterface"),
    "deepseek_v32": ({**LATENT, "index_topk": 8, "index_n_heads": 2}, "selects keys with an indexer"),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}, "(of type hybrid|Conv1d would carry)"),
    "jamba": ({"use_mamba_kernels": False, "num_experts": 2}, "JambaMambaMixer would carry state"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "Lfm2ShortConv would carry state"),
    "llama4_text": ({**EXPERTS, "intermediate_size_mlp": 32}, "layers of type chunked_attention"),
    "mamba": ({"state_size": 4}, "MambaBlock, MambaMixer would carry state"),
    "minimax": (EXPERTS, "MiniMaxLightningAttention would carry state"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "does not call its attention through"),
    "qwen3_next": (
        {**EXPERTS, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
        "Qwen3NextGatedDeltaNet would carry state",
    ),
    "recurrent_gemma": ({"lru_width": 32}, "Conv1d would carry state"),
    "rwkv": ({"attention_hidden_size": 32}, "RwkvSelfAttention.* would carry state"),
}


def small_model(model_type: str, **config: Any) -> PreTrainedModel:
    """A small random model of any architecture, whose logits differ clearly between tokens."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_mixers_are_refused_by_name(model_type: str) -> None:
    config, reason = REFUSED[model_type]
    model = small_model(model_type, **config)
    batch = build_batch(nested_pairs(64), [0], "tree")
    before = model.config._attn_implementation
    calls: list[Callable[..., Any]] = [check_supported, enable_packed_forward, lambda m: packed_forward(m, batch)]
    for call in calls:
        with pytest.raises(StepDPOError, match=rf"model {type(model).__name__} cannot be packed: .*{reason}"):
            call(model)
    # refused models are left as they were
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model)


def test_a_model_of_pictures_too() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TINY, "sliding_window": 7}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    with pytest.raises(StepDPOError, match="a gemma3 takes more than text: load its language model alone"):
        check_supported(model)


@pytest.mark.parametrize(("kind", "rope"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")])
def test_positions_that_depend_on_the_batch_are_bounded(tiny_model: Make, kind: str, rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    bounds: dict[str, int] = {"max_position_embeddings": 40}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 40}
        bounds = {"original_max_position_embeddings": 40} if kind == "phi3" else {}
    model = tiny_model(kind, rope_parameters=parameters, **bounds)
    pairs = nested_pairs()
    batch = build_batch(pairs, range(len(pairs)), "tree")
    assert batch.plan.max_k <= 40
    hidden = packed_forward(model, batch)  # exact up to there
    start, end = batch.plan.cu_k[-2:].tolist()
    path = batch.plan.keys.index[start:end]
    alone = model.base_model(input_ids=batch.input_ids[path][None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden[path], alone, rtol=1e-4, atol=1e-4)
    longer = type(pairs[0])([*pairs[0].prefix_ids, *range(3, 40)], [5, 6], [7], id="long")
    with pytest.raises(
        StepDPOError, match=r"a branch of 47 encoded tokens is longer than 40, .* the longest text in a batch"
    ):
        packed_forward(model, build_batch([longer], [0], "tree"))


def test_attention_dropout(tiny_model: Make) -> None:
    with pytest.raises(StepDPOError, match=r"attention_dropout is 0\.1; set it to 0\.0"):
        check_supported(tiny_model(attention_dropout=0.1))


def test_layers_of_another_type(tiny_model: Make) -> None:
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention", "chunked_attention"]
    with pytest.raises(StepDPOError, match="layers of type chunked_attention, linear_attention; only full_attention"):
        check_supported(model)


def test_a_backbone_without_a_head(tiny_model: Make) -> None:
    with pytest.raises(StepDPOError, match="LlamaModel has no language-model head"):
        check_supported(LlamaModel(tiny_model().config))


def test_an_encoder_decoder() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    reasons = why_not(T5ForConditionalGeneration(config))
    assert "it is an encoder-decoder" in reasons


def test_every_reason_is_given_at_once(tiny_model: Make) -> None:
    model = tiny_model(attention_dropout=0.25)
    model.config.layer_types = ["conv", "full_attention"]
    model.config.is_causal = False
    with pytest.raises(StepDPOError) as error:
        check_supported(model)
    assert len(why_not(model)) == 3
    for reason in why_not(model):
        assert reason in str(error.value)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llama", None], ids=["layer", "name", "none"])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(StepDPOError, match=f"a transformers causal language model, got {type(thing).__name__}"):
        check_supported(thing)


def test_wrappers_are_looked_through(tiny_model: Make) -> None:
    from peft import LoraConfig, get_peft_model

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = tiny_model()
    assert causal_lm(Wrapper(Wrapper(model))) is model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert causal_lm(Wrapper(adapted)) is model
    with pytest.raises(StepDPOError, match="got Linear"):
        causal_lm(Wrapper(nn.Linear(2, 2)))


def test_prompt_tuning_is_refused(tiny_model: Make) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for wrapped in (model, nn.ModuleDict({"module": model})):
        with pytest.raises(StepDPOError, match="PROMPT_TUNING puts virtual tokens before every text"):
            packed_forward(wrapped, build_batch(nested_pairs(), [0], "tree"))


def test_the_check_allocates_and_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model("qwen2")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    check_supported(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
