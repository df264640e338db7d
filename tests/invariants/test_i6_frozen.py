"""I6, what is frozen costs nothing: no dW for a frozen head, no dX for frozen hidden states, no product for either.

Counted in head products (2 * R * D * V floating point operations each) as torch's own counter sees them, and as bytes
allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import causal_lm, packed_forward
from stepdpo_kernels.ops.linear_logprob import linear_logprob
from stepdpo_kernels.packing import pack_pairs
from tests.allocations import Allocations
from tests.forests import forest_pairs

Make = Callable[..., PreTrainedModel]
R, D, V = 96, 40, 3001
PRODUCT = 2 * R * D * V


def _products(train_hidden: bool, train_weight: bool, impl: str) -> tuple[float, float, list[bool]]:
    """Head products of forward and of backward, and which of hidden and weight have a gradient."""
    hidden = torch.randn(R, D, requires_grad=train_hidden)
    weight = torch.randn(V, D, requires_grad=train_weight)
    with FlopCounterMode(display=False) as forward:
        logps = linear_logprob(hidden, weight, torch.randint(V, (R,)), impl=impl)
    with FlopCounterMode(display=False) as backward:
        if logps.requires_grad:
            logps.sum().backward()
    counts = [counter.get_total_flops() / PRODUCT for counter in (forward, backward)]
    return counts[0], counts[1], [x.grad is not None for x in (hidden, weight)]


# trained: (forward, backward); chunked computes the logits again in backward, reference keeps them
@pytest.mark.parametrize(
    ("impl", "recomputed"),
    [("chunked", 1), ("reference", 0)],
)
@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("train_hidden", [False, True])
def test_products_of_the_head(train_hidden: bool, train_weight: bool, impl: str, recomputed: int) -> None:
    forward, backward, gradients = _products(train_hidden, train_weight, impl)
    assert forward == 1
    wanted = train_hidden + train_weight
    assert backward == (wanted + recomputed if wanted else 0)
    assert gradients == [train_hidden, train_weight]


@pytest.mark.parametrize("impl", ["chunked", "auto"])
def test_bytes_of_the_head(impl: str) -> None:
    rows, size, vocabulary = 8, 300, 5000
    target = torch.randint(vocabulary, (rows,))
    for train_hidden in (True, False):
        hidden = torch.randn(rows, size, requires_grad=train_hidden)
        weight = torch.randn(vocabulary, size)
        with Allocations() as allocations:
            logps = linear_logprob(hidden, weight, target, impl=impl)
            if train_hidden:
                logps.sum().backward()
        # some chunks of logits, and nothing of the size of W
        assert allocations.largest <= 4 * rows * vocabulary
        assert allocations.peak < weight.nbytes
        assert weight.grad is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_loss_leaves_a_frozen_head_alone(layout: str) -> None:
    (batch,) = pack_pairs(forest_pairs(60), 10_000)
    weight = torch.randn(60, D)
    loss_fn = StepDPOLoss(reference_free=True)
    if layout == "packed":
        hidden = torch.randn(batch.num_tokens, D, requires_grad=True)
        loss = loss_fn.packed(hidden, weight, batch).loss
    else:
        hidden = torch.randn(4, 9, D, requires_grad=True)
        loss = loss_fn(hidden, weight, torch.randint(60, (4, 9))).loss
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_log_probs_of_a_reference_are_one_product(tiny_model: Make) -> None:
    model = tiny_model()
    (batch,) = pack_pairs(forest_pairs(), 10_000)
    with torch.no_grad():
        hidden = packed_forward(model, batch)
        with FlopCounterMode(display=False) as counter:
            StepDPOLoss(impl="chunked").packed_logps(hidden, model.lm_head.weight, batch)
    assert counter.get_total_flops() == 2 * batch.num_rows * 64 * 512


def test_lora_trains_its_adapter_and_nothing_else(tiny_model: Make) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    (batch,) = pack_pairs(forest_pairs(), 10_000)
    head = causal_lm(model).lm_head
    with FlopCounterMode(display=False) as counter:
        hidden = packed_forward(model, batch)
        before = counter.get_total_flops()
        out = StepDPOLoss(reference_free=True, impl="chunked").packed(hidden, head.weight, batch)
        after = counter.get_total_flops()
    assert after - before == 2 * batch.num_rows * 64 * 512
    out.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }
