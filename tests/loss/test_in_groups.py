"""StepDPOLoss with the gradients of its head taken in forward, group by group: the same loss, gradients and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels.loss import StepDPOLoss, StepDPOOutput
from stepdpo_kernels.ops.linear_logprob import cpu_kernel
from stepdpo_kernels.packing import SHARE_MODES, build_batch
from stepdpo_kernels.types import StepPair
from tests.forests import nested_pairs, step_pairs
from tests.loss.states import V, packed_hidden, padded_hidden, parameters, small

pytestmark = pytest.mark.skipif(cpu_kernel._missing is not None, reason=str(cpu_kernel._missing))
PAIRS = small(nested_pairs(V))
P = len(PAIRS)
KINDS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "rpo_alpha": 0.3},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "simpo", "simpo_gamma": 0.2},
    {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)},
    {"loss_type": "robust", "label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7},
]


def _in_groups(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(cpu_kernel, "group_rows", lambda weight: rows)
    monkeypatch.setattr(cpu_kernel, "LEAST_WORK", 0)
    monkeypatch.setattr(cpu_kernel, "kept_rows", lambda all_rows, weight: min(all_rows, rows))


def _taken_in_forward(out: StepDPOOutput) -> bool:
    return type(out.loss.grad_fn).__name__ == "ReadyBackward"


def _both(call: Callable[[], StepDPOOutput], leaves: list[Tensor], rows: int) -> None:
    """The same from groups of so many rows as without."""
    plain = call()
    expected = torch.autograd.grad(plain.loss, leaves)
    assert not _taken_in_forward(plain)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _in_groups(monkeypatch, rows)
        ours = call()
    assert _taken_in_forward(ours)
    gradients = torch.autograd.grad(ours.loss, leaves)
    torch.testing.assert_close(ours._replace(loss=ours.loss.detach()), plain._replace(loss=plain.loss.detach()))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padded(kind: dict[str, Any], weighted: bool) -> None:
    embedding, weight = parameters(torch.float32)
    _, labels = padded_hidden(embedding, PAIRS)
    loss_fn = StepDPOLoss(reference_free=True, impl="cpu", **kind)
    options: dict[str, Any] = {}
    if weighted:
        options = {"weights": torch.rand(P), "num_pairs": 3.0, "token_weights": 0.1 + torch.rand(labels.shape)}
    bias = torch.randn(V, requires_grad=True)

    def call() -> StepDPOOutput:
        hidden, _ = padded_hidden(embedding, PAIRS)
        return loss_fn(hidden, weight, labels, bias=bias, **options)

    _both(call, [embedding, weight, bias], 4)


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed(kind: dict[str, Any], share: str) -> None:
    embedding, weight = parameters(torch.float32)
    batch = build_batch(PAIRS + PAIRS[::-1], range(2 * P), share)
    loss_fn = StepDPOLoss(impl="cpu", reference_free=True, **kind)
    token_weights = 0.1 + torch.rand(batch.num_rows)

    def call() -> StepDPOOutput:
        hidden = packed_hidden(embedding, batch)
        return loss_fn.packed(hidden, weight, batch, num_pairs=5.0, token_weights=token_weights)

    if len(batch.group_ends) > 1:
        _both(call, [embedding, weight], 4)
    else:
        with pytest.MonkeyPatch.context() as monkeypatch:
            _in_groups(monkeypatch, 4)
            assert not _taken_in_forward(call())  # a single group cannot be divided


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(step_pairs(), min_size=2, max_size=4), st.sampled_from(SHARE_MODES))
def test_any_forest(problems: list[list[StepPair]], share: str) -> None:
    torch.manual_seed(0)
    pairs = small([pair for pairs in problems for pair in pairs])
    embedding, weight = parameters(torch.float32)
    batch = build_batch(pairs, range(len(pairs)), share)
    refs = -5 + torch.randn(2 * len(pairs))
    if len(batch.group_ends) > 1:
        loss_fn = StepDPOLoss(impl="cpu")
        _both(lambda: loss_fn.packed(packed_hidden(embedding, batch), weight, batch, refs), [embedding, weight], 1)


def test_an_odd_number_of_branches() -> None:
    embedding, weight = parameters(torch.float32)
    hidden, labels = padded_hidden(embedding, PAIRS)
    for call in (StepDPOLoss().logps, StepDPOLoss().pairwise):
        options = {} if call.__name__ == "logps" else {"loss_of": lambda logps: (logps.sum(), None)}
        with pytest.raises(ValueError, match=r"hidden must be \(2P, L, D\) and labels \(2P, L\), got"):
            call(hidden[:-1], weight, labels[:-1], **options)


def test_a_loss_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step-DPO written down by hand, in groups, is StepDPOLoss."""
    _in_groups(monkeypatch, 4)
    embedding, weight = parameters(torch.float32)
    hidden, labels = padded_hidden(embedding, PAIRS)
    token_weights, refs = 0.1 + torch.rand(labels.shape), -5 + torch.randn(2 * P)
    loss_fn = StepDPOLoss(0.3, impl="cpu")

    def loss_of(logps: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = (logps - refs).chunk(2)
        return -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean(), logps.detach()

    loss, logps = loss_fn.pairwise(hidden, weight, labels, loss_of, token_weights=token_weights)
    own = loss_fn(hidden, weight, labels, refs, token_weights=token_weights)
    assert _taken_in_forward(own)
    assert type(loss.grad_fn) is type(own.loss.grad_fn)
    assert torch.equal(logps, torch.cat([own.chosen_logps, own.rejected_logps]))
    torch.testing.assert_close(loss, own.loss)
    leaves = [embedding, weight]
    ours, theirs = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (loss, own.loss))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_weights_give_margins_of_exactly_zero(
    layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and reference go through the same groups (I2), also where the policy's head is frozen."""
    _in_groups(monkeypatch, 4)
    embedding, weight = (x.detach().to(dtype) for x in parameters(torch.float32))
    loss_fn = StepDPOLoss(impl="cpu")
    batch = build_batch(PAIRS, range(P), "pair")
    if layout == "packed":
        hidden = packed_hidden(embedding, batch)
        policy: Callable[..., StepDPOOutput] = lambda refs: loss_fn.packed(hidden, weight, batch, refs)  # noqa: E731
        refs = loss_fn.packed_logps(hidden, weight, batch)
    else:
        hidden, labels = padded_hidden(embedding, PAIRS)
        policy = lambda refs: loss_fn(hidden, weight, labels, refs)  # noqa: E731
        refs = loss_fn.logps(hidden, weight, labels)
    for trains_head in (False, True):
        hidden.requires_grad_()
        weight.requires_grad_(trains_head)
        out = policy(refs)
        assert _taken_in_forward(out) == trains_head
        assert out.margins.tolist() == [0.0] * P
        assert out.loss.item() == pytest.approx(
            math.log(2) * (batch.weights.mean().item() if layout == "packed" else 1), rel=1e-6
        )
