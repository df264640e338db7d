"""I2, a start at zero: before the first step, policy and reference agree to the last bit.

With the same weights and the same bins every margin is exactly 0.0, so every pair's loss is log 2, in float32 and in
bfloat16, whatever the policy does beside it: gradients, checkpointing, a fresh LoRA adapter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels._dispatch import use_impl
from stepdpo_kernels.loss import StepDPOLoss, StepDPOOutput
from stepdpo_kernels.model import causal_lm, packed_forward
from stepdpo_kernels.packing import SHARE_MODES, pack_pairs
from stepdpo_kernels.types import PackedBatch
from tests.exactness import MODELS
from tests.forests import forest_pairs, make_pair

Make = Callable[..., PreTrainedModel]
LOG_2 = torch.tensor(2.0).log().item()


def _head(model: PreTrainedModel) -> Any:
    return causal_lm(model).get_output_embeddings().weight


@torch.no_grad()
def _reference(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return StepDPOLoss().packed_logps(packed_forward(model, batch), _head(model), batch)


def _policy(model: PreTrainedModel, batch: PackedBatch, refs: Tensor) -> StepDPOOutput:
    return StepDPOLoss().packed(packed_forward(model, batch), _head(model), batch, refs)


def _assert_zero(out: StepDPOOutput, batch: PackedBatch) -> None:
    assert out.margins.tolist() == [0.0] * batch.num_pairs
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0] * batch.num_pairs
    assert not out.accuracy.any()
    mean_weight = batch.weights.double().mean().item()
    assert out.loss.item() == pytest.approx(mean_weight * math.log(2), rel=1e-6)
    assert out.loss.requires_grad


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_copy_is_a_reference(tiny_model: Make, which: str, dtype: torch.dtype, share: str) -> None:
    kind, config = MODELS[which]
    policy = tiny_model(kind, dtype=dtype, **config).train()
    reference = copy.deepcopy(policy).eval()
    for batch in pack_pairs(forest_pairs(), 200, share=share):
        _assert_zero(_policy(policy, batch, _reference(reference, batch)), batch)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_log_2_to_the_last_bit(tiny_model: Make, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)  # _one_thread puts it back
    # as many pairs as a power of two, so that their mean rounds nothing
    pairs = [make_pair(p.prefix_ids, p.chosen_ids, p.rejected_ids, group=p.group) for p in forest_pairs()[:8]]
    model = tiny_model(dtype=dtype)
    (batch,) = pack_pairs(pairs, 10_000)
    assert _policy(model, batch, _reference(model, batch)).loss.item() == LOG_2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_does_not_move_it(tiny_model: Make, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2", dtype=dtype)
    (batch,) = pack_pairs(forest_pairs(), 10_000)
    refs = _reference(model, batch)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    _assert_zero(_policy(model, batch, refs), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_is_no_change(tiny_model: Make, dtype: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    (batch,) = pack_pairs(forest_pairs(), 10_000)
    refs = _reference(tiny_model("qwen2", dtype=dtype), batch)
    model: Any = get_peft_model(tiny_model("qwen2", dtype=dtype), LoraConfig(r=4, target_modules="all-linear"))
    _assert_zero(_policy(model.train(), batch, refs), batch)
    with model.disable_adapter():
        assert torch.equal(_reference(model, batch), refs)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_for_each_implementation(tiny_model: Make, impl: str) -> None:
    model = tiny_model()
    (batch,) = pack_pairs(forest_pairs(), 10_000)
    with use_impl(linear_logprob=impl):
        _assert_zero(_policy(model, batch, _reference(model, batch)), batch)


def test_other_weights_are_noticed(tiny_model: Make) -> None:
    (batch,) = pack_pairs(forest_pairs(), 10_000)
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        reference.lm_head.weight[3, 5] += 1e-2
    out = _policy(policy, batch, _reference(reference, batch))
    assert out.margins.any()
