"""Models that would be silently wrong are refused by name, with every reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from stepdpo_kernels.model import SUPPORTED_MODEL_TYPES, causal_lm, check_supported, packed_forward, why_not
from stepdpo_kernels.model.forward import enable_packed_forward
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import StepDPOError
from tests.forests import nested_pairs

Make = Callable[..., PreTrainedModel]


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_supported(tiny_model: Make, kind: str) -> None:
    assert kind in SUPPORTED_MODEL_TYPES
    assert why_not(tiny_model(kind)) == []
    check_supported(tiny_model(kind))


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_rotary_embeddings_that_look_at_the_position_alone(tiny_model: Make, rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert why_not(tiny_model(rope_parameters=parameters)) == []


@pytest.mark.parametrize("enable", [packed_forward, enable_packed_forward, check_supported])
@pytest.mark.parametrize(
    ("config", "name"),
    [(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64), "GPT2LMHeadModel"), (_gemma2(), "Gemma2ForCausalLM")],
    ids=["gpt2", "gemma2"],
)
def test_other_families_are_refused_by_name(enable: Callable[..., Any], config: PreTrainedConfig, name: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    arguments = [build_batch(nested_pairs(64), [0], "tree")] if enable is packed_forward else []
    message = rf"model {name} cannot be packed: its model_type '{config.model_type}' is not one .*\(llama, qwen2\)"
    before = model.config._attn_implementation
    with pytest.raises(StepDPOError, match=message):
        enable(model, *arguments)
    # refused models are left as they were
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch(tiny_model: Make, rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}
    with pytest.raises(StepDPOError, match=rf"its rotary embedding \('{rope}'\) depends on the longest position"):
        check_supported(tiny_model(rope_parameters=parameters))


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
    model = tiny_model(attention_dropout=0.25, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    model.config.layer_types = ["conv", "full_attention"]
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
    with pytest.raises(StepDPOError):
        packed_forward(model, build_batch(nested_pairs(), [0], "tree"))


def test_the_check_allocates_and_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model("qwen2")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    check_supported(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
