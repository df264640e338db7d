"""Architectures that the tests do not cover: compared with themselves on the first batch, and then used or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdpo_kernels import _dispatch
from stepdpo_kernels.model import (
    attention,
    disable_packed_forward,
    enable_packed_forward,
    is_tested,
    packed_forward,
    verify,
    verify_first_batch,
    why_not,
)
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import PackedBatch, StepDPOError
from tests.families import FAMILIES
from tests.forests import make_pair, nested_pairs
from tests.model.test_support import small_model

Make = Callable[..., PreTrainedModel]
# model_type -> fields of its config
UNTESTED: dict[str, dict[str, Any]] = {
    "arcee": {},
    "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
}
# model_type -> fields of its config, and what is found
FAILING: dict[str, tuple[dict[str, Any], str]] = {
    # before 5.17 it did not ask transformers for its attention
    "nemotron": ({}, "(NemotronAttention was not given the packing plan|does not call its attention)"),
    "stablelm": ({}, "StableLmAttention was not given the packing plan"),
    "exaone4": (
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        "layer 1 attended with a window of 5 where its configuration says None",
    ),
    "doge": ({}, "cannot be packed: RuntimeError: The size of tensor a"),
}


def _batch(vocab_size: int = 64) -> PackedBatch:
    pairs = nested_pairs(vocab_size)
    return build_batch(pairs, range(len(pairs)), "tree")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each verification answered."""
    answers: list[bool] = []

    def counted(model: Any, batch: PackedBatch) -> bool:
        answers.append(verify_first_batch(model, batch))
        return answers[-1]

    monkeypatch.setattr("stepdpo_kernels.model.forward.verify_first_batch", counted)
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_supported_families_pass(tiny_model: Make, kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype, **FAMILIES[kind].config).train()
    assert verify_first_batch(model, _batch(512))
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("model_type", UNTESTED)
def test_an_untested_model_is_compared_once(model_type: str, calls: list[bool]) -> None:
    model, batch = small_model(model_type, **UNTESTED[model_type]), _batch()
    assert not is_tested(model)
    assert why_not(model) == []
    for _ in range(2):
        assert packed_forward(model, batch).shape == (batch.num_tokens, 32)
    assert calls == [True]


@pytest.mark.parametrize("model_type", FAILING)
def test_a_model_that_cannot_follow_the_plan_is_refused(model_type: str) -> None:
    config, found = FAILING[model_type]
    model, batch = small_model(model_type, **config), _batch()
    for _ in range(2):  # and again, not only the first time
        with pytest.raises(StepDPOError, match=found):
            packed_forward(model, batch)


def test_a_tested_model_is_not_compared(tiny_model: Make, calls: list[bool]) -> None:
    packed_forward(tiny_model(), _batch())
    assert not calls


@pytest.mark.parametrize(("wanted", "expected"), [(None, 0), (True, 1), (False, 0)])
def test_an_enabled_model_is_compared_when_asked(
    tiny_model: Make, calls: list[bool], wanted: bool | None, expected: int
) -> None:
    model, batch = tiny_model(), _batch()
    enable_packed_forward(model, verify=wanted)
    for _ in range(2):
        model(packed_batch=batch, head=lambda hidden, _: hidden)
    assert len(calls) == expected
    disable_packed_forward(model)


@pytest.mark.parametrize(("wanted", "expected"), [(None, 1), (False, 0)])
def test_an_untested_model_may_be_let_through(calls: list[bool], wanted: bool | None, expected: int) -> None:
    model, batch = small_model("gpt_neox"), _batch()
    enable_packed_forward(model, verify=wanted)
    for _ in range(2):
        model(packed_batch=batch, head=lambda hidden, _: hidden)
    assert len(calls) == expected


def _wrong_position(original: Callable[..., Any], *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
    """Positions in packed order, in a packed forward alone."""
    if kwargs.get("stepdpo_plan") is not None:
        position_ids = torch.arange(position_ids.shape[1])[None]
    return original(*args, position_ids=position_ids, **kwargs)


def _wider(original: Callable[..., Tensor], *args: Any, sliding_window: int | None, **kwargs: Any) -> Tensor:
    return original(*args, sliding_window=sliding_window and sliding_window + 2, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", ["position", "window", "softcap", "head"])
def test_a_model_that_is_wrong_is_noticed(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, error: str, dtype: torch.dtype
) -> None:
    model: Any = tiny_model("gemma2", dtype=dtype, **FAMILIES["gemma2"].config)
    assert verify_first_batch(model, _batch(512))
    tree_attention: Any = vars(attention)["tree_attention"]
    if error == "position":
        monkeypatch.setattr(model.model, "forward", partial(_wrong_position, model.model.forward))
    elif error == "window":
        monkeypatch.setattr(attention, "tree_attention", partial(_wider, tree_attention))
    elif error == "softcap":
        monkeypatch.setattr(attention, "tree_attention", lambda *a, **k: tree_attention(*a, **{**k, "softcap": None}))
    else:
        monkeypatch.setattr(verify, "head_options", lambda model: {})
    with pytest.raises(
        StepDPOError, match=r"model Gemma2ForCausalLM \(gemma2\) cannot be packed: on 3 pairs .* differ by"
    ):
        verify_first_batch(model, _batch(512))


class Leaky(nn.Module):
    """Adds to every token a part of the one before it in packed order."""

    def __init__(self, mlp: nn.Module, part: float) -> None:
        super().__init__()
        self.mlp, self.part = mlp, part

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x) + self.part * torch.nn.functional.pad(x, (0, 0, 1, -1))
        return mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [2, 32])
def test_a_mixer_that_nobody_has_heard_of_is_noticed(tiny_model: Make, layers: int, dtype: torch.dtype) -> None:
    # of 60 tokens of a step one is wrong, which a mean over all would hide
    pairs = [make_pair([*range(1, 61)], [*range(60 + i, 120 + i)], [*range(200 + i, 260 + i)]) for i in (0, 70, 140)]
    batch = build_batch(pairs, range(3), "tree")
    model: Any = tiny_model(num_hidden_layers=layers, dtype=dtype)
    assert verify_first_batch(model, batch)
    model.model.layers[0].mlp = Leaky(model.model.layers[0].mlp, 0.1)
    with pytest.raises(StepDPOError, match=r"differ by|move by up to .* when only tokens of other"):
        verify_first_batch(model, batch)


def test_a_class_of_ones_own_is_compared(tiny_model: Make, calls: list[bool]) -> None:
    model: Any = tiny_model()
    own = type("MyLlama", (type(model),), {"__module__": "my_models"})
    model.__class__ = own
    assert not is_tested(model)
    packed_forward(model, _batch())
    assert calls == [True]


def test_pairs_of_one_step_are_compared_where_there_are_no_others(calls: list[bool]) -> None:
    model = small_model("gpt_neox")
    one_sided = [make_pair([1, 2, 3], [4, 5], []), make_pair([1, 2], [], []), make_pair([7], [], [9, 10])]
    packed_forward(model, build_batch(one_sided, [1], "tree"))
    packed_forward(model, build_batch(one_sided, [0, 1, 2], "tree"))
    packed_forward(model, build_batch(one_sided, [0], "tree"))
    assert calls == [False, True]


def test_the_comparison_ignores_autocast_and_gradients(tiny_model: Make) -> None:
    model, batch = tiny_model(), _batch(512)
    with torch.autocast("cpu", torch.bfloat16):
        assert verify_first_batch(model, batch)
    broken = replace(batch, targets=batch.targets.flip(0))  # still a batch of pairs, others
    assert verify_first_batch(model, broken)


def test_the_definition_passes_as_well(tiny_model: Make) -> None:
    with _dispatch.use_impl("reference"):
        assert verify_first_batch(tiny_model(), _batch(512))


def test_an_adapter_takes_part(tiny_model: Make) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert verify_first_batch(model, _batch(512))
