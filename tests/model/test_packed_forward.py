"""Hidden states of packed forests, and models that go on as before."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stepdpo_kernels.model import causal_lm, disable_packed_forward, enable_packed_forward, packed_forward
from stepdpo_kernels.model.attention import PREFIX, SignedPlan, tree_attention_forward, use_tree_attention
from stepdpo_kernels.packing import SHARE_MODES, build_batch
from stepdpo_kernels.types import PackedBatch, StepDPOError
from tests.families import FAMILIES
from tests.forests import forest_pairs

Make = Callable[..., PreTrainedModel]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama plain": ("llama", {}),
    "qwen2 plain": ("qwen2", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    **{kind: (kind, family.config) for kind, family in FAMILIES.items()},
}
every_model = pytest.mark.parametrize("which", MODELS)


def _make(tiny_model: Make, which: str, **more: Any) -> PreTrainedModel:
    kind, options = MODELS[which]
    return tiny_model(kind, **options, **more)


def _batch(share: str = "tree") -> PackedBatch:
    pairs = forest_pairs()
    return build_batch(pairs, range(len(pairs)), share)


def _path_by_path(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """(T, D): every root-to-leaf path as a sequence of its own, through the model's eager attention."""
    model.set_attn_implementation("eager")
    hidden: dict[int, Tensor] = {}
    cuts = batch.plan.cu_k.tolist()
    for start, stop in pairwise(cuts):
        path = batch.plan.keys.index[start:stop]
        states = model.base_model(input_ids=batch.input_ids[path][None], use_cache=False).last_hidden_state[0]
        hidden |= dict(zip(path.tolist(), states, strict=True))
    return torch.stack([hidden[t] for t in range(batch.num_tokens)])


@every_model
@pytest.mark.parametrize("share", SHARE_MODES)
def test_every_token_is_what_it_is_on_its_own_branch(tiny_model: Make, which: str, share: str) -> None:
    batch = _batch(share)
    model = _make(tiny_model, which)
    with torch.no_grad():
        ours = packed_forward(model, batch)
        expected = _path_by_path(model, batch)
    assert ours.shape == (batch.num_tokens, 64)
    error = (ours - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-5


def test_the_window_matters(tiny_model: Make) -> None:
    # or the test above would say nothing about sliding layers
    batch = _batch()
    wide, narrow = (_make(tiny_model, which) for which in ("qwen2 plain", "qwen2"))
    narrow.load_state_dict(wide.state_dict())
    with torch.no_grad():
        assert (packed_forward(wide, batch) - packed_forward(narrow, batch)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_hidden_states_have_the_models_dtype(tiny_model: Make, dtype: torch.dtype) -> None:
    assert packed_forward(tiny_model(dtype=dtype), _batch()).dtype == dtype


def test_autocast(tiny_model: Make) -> None:
    batch, model = _batch(), tiny_model("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        ours = packed_forward(model, batch)
        expected = _path_by_path(model, batch)
    ours.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.base_model.parameters())
    exact = _path_by_path(model, batch)
    # as far from float32 as eager attention is
    error, eager_error = ((x.float() - exact).norm() / exact.norm() for x in (ours, expected))
    assert error < 1.5 * eager_error < 0.1


def _padded() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 512, (3, 20), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[0, 13:] = 0  # padding on the right
    mask[1, :9] = 0  # and on the left
    return {"input_ids": input_ids, "attention_mask": mask}


@every_model
@pytest.mark.parametrize("before", ["default", "eager"])
def test_ordinary_forward_of_a_switched_model_is_the_same_bit_for_bit(
    tiny_model: Make, which: str, before: str
) -> None:
    plain, switched = (_make(tiny_model, which) for _ in range(2))
    implementation = plain.config._attn_implementation
    assert implementation == ("eager" if which in ("gemma2", "gpt_oss") else "sdpa")
    if before == "eager":
        for model in (plain, switched):
            model.set_attn_implementation("eager")
    packed_forward(switched, _batch())
    assert switched.config._attn_implementation == PREFIX + plain.config._attn_implementation
    inputs = _padded()
    for arguments in (inputs, {"input_ids": inputs["input_ids"]}, inputs | {"labels": inputs["input_ids"]}):
        expected, ours = plain(**arguments), switched(**arguments)
        assert torch.equal(ours.logits, expected.logits)
    ours.loss.backward()
    expected.loss.backward()
    for a, b in zip(switched.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def _generated(model: PreTrainedModel, **more: Any) -> list[Tensor]:
    """Tokens and scores of every step."""
    inputs = _padded()
    inputs["attention_mask"][0] = 1  # generation wants padding on the left
    generate: Any = model.generate
    out = generate(
        **inputs, max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True, **more
    )
    return [out.sequences, *out.scores]


@every_model
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_a_switched_model_is_the_same(tiny_model: Make, which: str, beams: int) -> None:
    plain, switched = (_make(tiny_model, which) for _ in range(2))
    packed_forward(switched, _batch())
    expected, ours = (_generated(model, num_beams=beams) for model in (plain, switched))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_model_that_changes_its_attention_is_switched_again(tiny_model: Make) -> None:
    model, batch, inputs = tiny_model(), _batch(), _padded()
    hidden = packed_forward(model, batch)
    model.set_attn_implementation("eager")
    eager = model(**inputs).logits
    assert torch.equal(packed_forward(model, batch), hidden)
    assert model.config._attn_implementation == f"{PREFIX}eager"
    assert torch.equal(model(**inputs).logits, eager)


def test_an_implementation_that_looks_its_own_name_up(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # as transformers' functions for FlashAttention do
    names = []

    def flash(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    for interface, function in ((AttentionInterface, flash), (AttentionMaskInterface, sdpa_mask)):
        monkeypatch.setattr(interface, "_global_mapping", {**interface._global_mapping, "own_flash": function})
    model, inputs = tiny_model(), _padded()
    expected = model(**inputs).logits
    model.config._attn_implementation = "own_flash"
    use_tree_attention(model)
    assert torch.equal(model(**inputs).logits, expected)
    assert names == ["own_flash"] * 2
    assert model.config._attn_implementation == f"{PREFIX}own_flash"


def test_generation_of_an_enabled_model_is_the_same(tiny_model: Make) -> None:
    plain, enabled = tiny_model(), tiny_model()
    enable_packed_forward(enabled)
    assert all(torch.equal(a, b) for a, b in zip(_generated(enabled), _generated(plain), strict=True))


def test_the_signature_of_an_enabled_model_names_what_it_takes(tiny_model: Make) -> None:
    model = tiny_model()
    before = set(inspect.signature(model.forward).parameters)
    assert {"input_ids", "position_ids", "labels", "logits_to_keep"} <= before
    enable_packed_forward(model)
    assert before <= set(inspect.signature(model.forward).parameters)


def _head(hidden: Tensor, embedding: nn.Module) -> tuple[Tensor, nn.Module]:
    return hidden, embedding


def test_enabled_forward_takes_packed_batches_and_ordinary_calls(tiny_model: Make) -> None:
    model, batch, inputs = tiny_model(), _batch(), _padded()
    expected_hidden = packed_forward(model, batch)
    expected_logits = model(**inputs).logits
    enable_packed_forward(model)
    hidden, embedding = model(packed_batch=batch, head=_head)
    assert torch.equal(hidden, expected_hidden)
    assert embedding is model.lm_head
    assert torch.equal(model(**inputs).logits, expected_logits)
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, expected_logits)
    with pytest.raises(ValueError, match="packed_batch needs head="):
        model(packed_batch=batch)


def test_disabling_restores_the_forward(tiny_model: Make) -> None:
    model, inputs = tiny_model(), _padded()
    before = set(vars(model))
    enable_packed_forward(model)
    enable_packed_forward(model)  # twice is once
    disable_packed_forward(model)
    assert set(vars(model)) == before
    assert model.forward.__func__ is type(model).forward
    assert model(**inputs).logits.shape == (3, 20, 512)
    disable_packed_forward(model)  # nothing left to undo
    enable_packed_forward(model)
    assert model(packed_batch=_batch(), head=_head)[0].shape[1] == 64


def test_disabling_restores_somebody_elses_forward(tiny_model: Make) -> None:
    model, calls = tiny_model(), []
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = counted
    enable_packed_forward(model)
    model(**_padded())
    assert len(calls) == 1
    disable_packed_forward(model)
    model(**_padded())
    assert len(calls) == 2


def test_a_copy_of_an_enabled_model_is_independent(tiny_model: Make) -> None:
    model, batch = tiny_model(), _batch()
    enable_packed_forward(model)
    expected = model(packed_batch=batch, head=_head)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    hidden, embedding = twin(packed_batch=batch, head=_head)
    assert not hidden.any()
    assert embedding is twin.lm_head
    assert not twin(**_padded()).logits.any()
    assert torch.equal(model(packed_batch=batch, head=_head)[0], expected)
    disable_packed_forward(twin)
    assert torch.equal(model(packed_batch=batch, head=_head)[0], expected)


def test_an_enabled_model_saves_and_loads_as_any_other(tiny_model: Make, tmp_path: Path) -> None:
    model, inputs = tiny_model("qwen2"), _padded()
    keys = set(model.state_dict())
    enable_packed_forward(model)
    packed_forward(model, _batch())
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert PREFIX not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def _without_plan(original: Callable[..., Any], *args: Any, stepdpo_plan: Any = None, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_a_layer_that_drops_the_plan_is_caught(tiny_model: Make, layers: list[int], share: str) -> None:
    model = tiny_model()
    for i in layers:
        attention = model.model.layers[i].self_attn
        attention.forward = partial(_without_plan, attention.forward)
    with pytest.raises(StepDPOError, match="LlamaAttention was not given the packing plan"):
        packed_forward(model, _batch(share))


def test_a_layer_that_never_attends_is_caught(tiny_model: Make) -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(StepDPOError, match="LlamaForCausalLM: 1 of 2 layers used the packing plan"):
        packed_forward(model, _batch())


def test_a_layer_without_attention_is_named(tiny_model: Make) -> None:
    class Mixer(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            return hidden_states.cumsum(1), None

    model = tiny_model()
    model.model.layers[1].self_attn = Mixer()
    with pytest.raises(StepDPOError, match=r"LlamaForCausalLM: 1 of 2 layers used .* cannot be packed"):
        packed_forward(model, _batch())


def _adapted(model: PreTrainedModel, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, **options)
        return get_peft_model(model, config)


def test_lora_adapters_count(tiny_model: Make) -> None:
    batch = _batch()
    with torch.no_grad():
        base = packed_forward(tiny_model(), batch)
        model = _adapted(tiny_model())
        ours = packed_forward(model, batch)
        assert (ours - base).abs().max() > 0.1
        torch.testing.assert_close(ours, packed_forward(model.merge_and_unload(), batch), rtol=1e-4, atol=1e-4)


def test_a_disabled_adapter_leaves_the_reference(tiny_model: Make) -> None:
    batch = _batch()
    base = packed_forward(tiny_model(), batch)
    model = _adapted(tiny_model())
    with model.disable_adapter():
        assert torch.equal(packed_forward(model, batch), base)


def test_enabling_a_peft_model(tiny_model: Make) -> None:
    batch, model = _batch(), _adapted(tiny_model())
    expected = packed_forward(model, batch)
    enable_packed_forward(model)
    hidden, embedding = model(packed_batch=batch, head=_head)
    assert torch.equal(hidden, expected)
    assert embedding is causal_lm(model).lm_head
    hidden.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in with_gradient)
    logits = model(**_padded()).logits
    disable_packed_forward(model)
    assert torch.equal(model(**_padded()).logits, logits)


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(tiny_model: Make, which: str, reentrant: bool) -> None:
    batch = _batch()
    models = [_make(tiny_model, which).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        models[1].enable_input_require_grads()
    hidden = [packed_forward(model, batch) for model in models]
    assert any(getattr(module, "gradient_checkpointing", False) for module in models[1].modules())
    upstream = torch.randn_like(hidden[0])
    for h in hidden:
        h.backward(upstream)
    assert torch.equal(*hidden)
    for (name, a), b in zip(models[0].base_model.named_parameters(), models[1].base_model.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


def test_the_attention_function_refuses_what_it_does_not_compute(tiny_model: Make) -> None:
    module = tiny_model().model.layers[0].self_attn
    batch = _batch()
    states = torch.ones(1, 4, batch.num_tokens, 16)
    signed = SignedPlan(batch.plan)
    call = partial(tree_attention_forward, module, states, states, states, stepdpo_plan=signed, attention_mask=None)
    assert call()[0].shape == (1, batch.num_tokens, 4, 16)
    with pytest.raises(ValueError, match=r"no dropout, got 0\.1"):
        call(dropout=0.1)
    for name in ("position_bias", "cache"):
        with pytest.raises(ValueError, match=f"tree attention cannot apply {name} of LlamaAttention"):
            call(**{name: 3.0})
        call(**{name: None})
    with pytest.raises(ValueError, match="cannot apply is_causal=False of LlamaAttention"):
        call(is_causal=False)
    with pytest.raises(ValueError, match="cannot apply a mask of LlamaAttention's own"):
        call(attention_mask=torch.ones(1, 1, batch.num_tokens, batch.num_tokens, dtype=torch.bool))
    two = states.expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="a packed forest is a batch of 1, got 2"):
        tree_attention_forward(module, two, two, two, None, signed)


def test_scaling_and_window_reach_the_attention(tiny_model: Make) -> None:
    module, batch = tiny_model().model.layers[0].self_attn, _batch()
    query = torch.randn(1, 4, batch.num_tokens, 16)
    signed = SignedPlan(batch.plan)
    call = partial(tree_attention_forward, module, query, query, query, None, signed)
    default = call()[0]
    assert torch.equal(call(scaling=0.25)[0], default)  # 16 ** -0.5
    assert not torch.allclose(call(scaling=0.5)[0], default)
    alone = call(sliding_window=1)[0]  # every token sees itself only
    torch.testing.assert_close(alone, query.transpose(1, 2))
    assert signed.windows == {0: 1}
