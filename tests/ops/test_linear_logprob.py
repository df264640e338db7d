"""The head's contract and its chunked implementation, over many chunks of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdpo_kernels.ops.linear_logprob import chunked, linear_logprob, reference
from tests.allocations import Allocations
from tests.numerics import assert_as_good_as_eager, eager_logprob, value_and_gradients

# Nothing divides anything: no chunk is full but by intent.
R, D, V = 23, 37, 131
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.5},
    "scale": {"logit_scale": 0.0625},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": -1.5},
}
# (CHUNK_BYTES, MIN_COLUMNS) -> chunks of rows x columns for float32: as shipped, 2 x 3, 8 x 16, all rows x 64 columns,
# 4 rows x all columns. For float64 half as many rows.
CHUNKS = {
    "shipped": (chunked.CHUNK_BYTES, chunked.MIN_COLUMNS),
    "tiny": (4 * 2 * 3, 3),
    "small": (4 * 8 * 16, 16),
    "columns": (4 * R * 64, 5),
    "rows": (4 * 4 * V, V),
}


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(name: str) -> None:
        size, columns = CHUNKS[name]
        monkeypatch.setattr(chunked, "CHUNK_BYTES", size)
        monkeypatch.setattr(chunked, "MIN_COLUMNS", columns)

    return use


def _inputs(
    dtype: torch.dtype = torch.float32, rows: int = R, size: int = D, vocabulary: int = V, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias in `dtype`, target, and an upstream gradient of either sign with zeros in it."""
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = scale * normal(rows, size), normal(vocabulary, size), normal(vocabulary)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[:2] = torch.tensor([0, vocabulary - 1])[:rows]
    upstream = normal(rows)
    upstream[::5] = 0
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target, upstream


def _call(op: Callable[..., Tensor], target: Tensor, options: dict[str, Any], **more: Any) -> Callable[..., Tensor]:
    """op as a function of (hidden, weight) or (hidden, weight, bias)."""
    rest = {k: v for k, v in options.items() if k != "bias"} | more

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return op(hidden, weight, target, bias=bias, **rest)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_as_good_as_eager_forward_and_backward(
    chunks: Callable[[str], None], chunk: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    chunks(chunk)
    hidden, weight, bias, target, upstream = _inputs(dtype)
    inputs = [hidden, weight] + ([bias] if "bias" in options else [])
    ours = value_and_gradients(_call(linear_logprob, target, options, impl="chunked"), inputs, upstream)
    eager = value_and_gradients(_call(eager_logprob, target, options), inputs, upstream)
    oracle = value_and_gradients(_call(eager_logprob, target, options), inputs, upstream, torch.float64)
    names = ["log-probs", "dX", "dW", "db"]
    if dtype == torch.float64:
        for a, c in zip(ours, oracle, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
        return
    for name, a, b, c in zip(names, ours, eager, oracle, strict=False):
        assert_as_good_as_eager(name, a, b, c, dtype)
    for gradient in ours[1:]:
        assert gradient.dtype == dtype
    # The log-probs are as good as those of float32 logits, whatever the dtype of the inputs.
    compute = torch.float32
    assert ours[0].dtype == torch.float32
    float_eager = value_and_gradients(_call(eager_logprob, target, options), inputs, upstream, compute)
    assert_as_good_as_eager("log-probs against float32 logits", ours[0], float_eager[0], oracle[0], compute)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk", ["tiny", "small"])
def test_gradients_by_finite_differences(chunks: Callable[[str], None], chunk: str, options: dict[str, Any]) -> None:
    chunks(chunk)
    hidden, weight, bias, target, _ = _inputs(torch.float64, rows=5, size=3, vocabulary=11)
    inputs = [hidden, weight] + ([bias] if "bias" in options else [])
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(_call(linear_logprob, target, options, impl="chunked"), inputs)


def test_the_reference_against_numpy() -> None:
    hidden, weight, bias, target, _ = _inputs(torch.float64)
    logits = np.einsum("rd,vd->rv", hidden.numpy(), weight.numpy()) + bias.numpy()
    logits = 3 * np.tanh(0.5 * logits / 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(probabilities[np.arange(R), target.numpy()])
    options: dict[str, Any] = {"bias": bias, "softcap": 3.0, "logit_scale": 0.5}
    for impl in ("reference", "chunked"):
        ours = linear_logprob(hidden, weight, target, impl=impl, **options)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(
        reference.linear_logprob(hidden, weight, target, **options).numpy(), expected, rtol=1e-12
    )


@pytest.mark.parametrize("chunk", ["shipped", "small"])
def test_log_probs_of_all_targets_sum_to_one(chunks: Callable[[str], None], chunk: str) -> None:
    chunks(chunk)
    hidden, weight, *_ = _inputs(rows=1)
    logps = linear_logprob(hidden.expand(V, D), weight, torch.arange(V), impl="chunked")
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert (logps < 0).all()


@pytest.mark.parametrize("chunk", ["shipped", "tiny", "small"])
@pytest.mark.parametrize("offset", [-1e4, 1e4, -50.0])
def test_no_phantom_logits(chunks: Callable[[str], None], chunk: str, offset: float) -> None:
    # With every true logit far below zero a padded column of zeros would take all the probability.
    chunks(chunk)
    hidden, weight, bias, target, upstream = _inputs(torch.float64)
    shifted = [hidden, weight, bias + offset]
    ours = value_and_gradients(_call(linear_logprob, target, {}, impl="chunked"), shifted, upstream)
    plain = value_and_gradients(_call(eager_logprob, target, {}), [hidden, weight, bias], upstream)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", ["shipped", "tiny", "small"])
def test_extreme_logits(chunks: Callable[[str], None], chunk: str, dtype: torch.dtype) -> None:
    chunks(chunk)
    hidden, weight, _, target, upstream = _inputs(dtype, scale=500.0)
    logits = hidden.double() @ weight.double().T
    assert logits.abs().max() > 1e4
    target[:8] = logits[:8].argmax(dim=1)  # log-prob 0, and gradient 0
    target[8:16] = logits[8:16].argmin(dim=1)  # log-probs of about -2e4
    ours, eager, oracle = (
        value_and_gradients(op, [hidden, weight], upstream, as_dtype)
        for op, as_dtype in (
            (_call(linear_logprob, target, {}, impl="chunked"), None),
            (_call(eager_logprob, target, {}), None),
            (_call(eager_logprob, target, {}), torch.float64),
        )
    )
    assert oracle[0].min() < -1e4
    for name, a, b, c in zip(["log-probs", "dX", "dW"], ours, eager, oracle, strict=True):
        assert_as_good_as_eager(name, a, b, c, dtype)


@pytest.mark.parametrize("chunk", ["shipped", "tiny", "small"])
def test_masked_logits(chunks: Callable[[str], None], chunk: str) -> None:
    # A bias of -inf bars tokens, also the whole first chunk and the whole last one.
    chunks(chunk)
    hidden, weight, bias, target, upstream = _inputs(torch.float64)
    bias[:40] = bias[100:] = -torch.inf
    target = 40 + target % 60
    ours = value_and_gradients(_call(linear_logprob, target, {}, impl="chunked"), [hidden, weight, bias], upstream)
    inside = [hidden, weight[40:100], bias[40:100]]
    plain = value_and_gradients(_call(eager_logprob, target - 40, {}), inside, upstream)
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])
    torch.testing.assert_close(ours[2][40:100], plain[2])
    assert not ours[2][:40].any()
    assert not ours[2][100:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_with_a_common_part(chunks: Callable[[str], None], dtype: torch.dtype) -> None:
    # The part of dX that all rows of W have in common cancels between chunks, so roundings of chunks may not pile up.
    chunks("small")
    hidden, weight, _, target, upstream = _inputs(dtype, rows=40, size=64, vocabulary=1009, scale=0.1)
    weight = (weight + 10).to(dtype)
    ours = value_and_gradients(_call(linear_logprob, target, {}, impl="chunked"), [hidden, weight], upstream)
    eager = value_and_gradients(_call(eager_logprob, target, {}), [hidden, weight], upstream)
    oracle = value_and_gradients(_call(eager_logprob, target, {}), [hidden, weight], upstream, torch.float64)
    for name, a, b, c in zip(["log-probs", "dX", "dW"], ours, eager, oracle, strict=True):
        assert_as_good_as_eager(name, a, b, c, dtype)


def test_the_weights_gradient_over_many_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # 250 chunks that all push one token the same way: a bfloat16 sum of them would stand still.
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(chunked, "MIN_COLUMNS", 50)
    hidden, weight, *_ = _inputs(torch.bfloat16, rows=2000, size=8, vocabulary=50)
    inputs, target, upstream = [hidden.abs(), weight], torch.full((2000,), 7), torch.full((2000,), 0.3)
    ours = value_and_gradients(_call(linear_logprob, target, {}, impl="chunked"), inputs, upstream)
    eager = value_and_gradients(_call(eager_logprob, target, {}), inputs, upstream)
    oracle = value_and_gradients(_call(eager_logprob, target, {}), inputs, upstream, torch.float64)
    assert_as_good_as_eager("dW", ours[2], eager[2], oracle[2], torch.bfloat16)


@pytest.mark.parametrize("impl", ["chunked", "reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(impl: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, *_ = (x.requires_grad_() for x in _inputs(dtype)[:3])
    nothing = linear_logprob(hidden[:0], weight, torch.empty(0, dtype=torch.int64), bias=bias, impl=impl)
    assert nothing.shape == (0,)
    assert nothing.dtype == torch.promote_types(dtype, torch.float32)
    # still part of the graph: the sum's gradient is zero, not missing
    for gradient in torch.autograd.grad(nothing.sum(), [hidden, weight, bias]):
        assert not gradient.any()


@pytest.mark.parametrize("chunk", ["shipped", "tiny"])
def test_one_row_and_one_column(chunks: Callable[[str], None], chunk: str) -> None:
    chunks(chunk)
    hidden, weight, _, target, upstream = _inputs(torch.float64, rows=1)
    ours = value_and_gradients(_call(linear_logprob, target, {}, impl="chunked"), [hidden, weight], upstream + 1)
    plain = value_and_gradients(_call(eager_logprob, target, {}), [hidden, weight], upstream + 1)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    certain = [hidden, weight[:1]]
    for value in value_and_gradients(_call(linear_logprob, target * 0, {}, impl="chunked"), certain, upstream + 1):
        assert not value.any()


def test_one_hidden_state_for_all_rows_and_a_tied_weight() -> None:
    _, weight, *_ = _inputs(torch.float64)
    weight.requires_grad_()
    target = torch.full((6,), 3)
    (ours,) = torch.autograd.grad(linear_logprob(weight[:1].expand(6, D), weight, target, impl="chunked").sum(), weight)
    (plain,) = torch.autograd.grad(eager_logprob(weight[:1].expand(6, D), weight, target).sum(), weight)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("chunk", ["shipped", "small"])
def test_inputs_and_gradient_need_not_be_contiguous(chunks: Callable[[str], None], chunk: str) -> None:
    chunks(chunk)
    hidden, weight, bias, target, _ = _inputs(torch.float64)
    layouts = [
        hidden.T.contiguous().T,
        torch.cat([weight, weight], dim=1)[:, :D],
        torch.stack([bias, bias], dim=1)[:, 0],
    ]
    strided = torch.stack([target, target], dim=1)[:, 1]
    assert not any(x.is_contiguous() for x in [*layouts, strided])
    for x in (*layouts, hidden, weight, bias):
        x.requires_grad_()
    ours = linear_logprob(layouts[0], layouts[1], strided, bias=layouts[2], impl="chunked")
    plain = eager_logprob(hidden, weight, target, bias=bias)
    torch.testing.assert_close(ours, plain)
    # the gradient of a sum is one number, expanded
    for a, b in zip(
        torch.autograd.grad(ours.sum(), layouts), torch.autograd.grad(plain.sum(), [hidden, weight, bias]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_same_bits_every_time_and_inputs_untouched(chunks: Callable[[str], None]) -> None:
    chunks("small")
    hidden, weight, bias, target, upstream = _inputs(torch.bfloat16)
    before = [x.clone() for x in (hidden, weight, bias, target)]
    call = _call(linear_logprob, target, {"softcap": 4.0}, impl="chunked")
    first, again = (value_and_gradients(call, [hidden, weight, bias], upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, bias, target), strict=True))


@pytest.mark.parametrize("frozen", ["weight", "hidden", "weight and bias", "all"])
def test_what_is_frozen_is_not_computed(frozen: str) -> None:
    hidden, weight, bias, target, upstream = _inputs(rows=64, size=48, vocabulary=4000)
    hidden.requires_grad_(frozen not in ("hidden", "all"))
    weight.requires_grad_(frozen == "hidden")
    bias.requires_grad_(frozen in ("weight", "hidden"))
    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
    logps = linear_logprob(hidden, weight, target, bias=bias, impl="chunked")
    assert logps.requires_grad == bool(wanted)
    if not wanted:
        return
    with Allocations() as allocations:
        gradients = torch.autograd.grad(logps, wanted, upstream.float())
    full = value_and_gradients(_call(eager_logprob, target, {}), [hidden, weight, bias], upstream, torch.float64)
    expected = [g for x, g in zip((hidden, weight, bias), full[1:], strict=True) if x.requires_grad]
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    if "weight" in frozen:
        # one chunk holds all logits here, so anything larger is a dW
        logits = 64 * 4000 * 4
        assert allocations.largest <= logits
        assert weight.grad is None


def test_a_frozen_weight_allocates_no_gradient_of_its_size(chunks: Callable[[str], None]) -> None:
    chunks("small")
    hidden, weight, _, target, _ = _inputs(vocabulary=5000)
    logps = linear_logprob(hidden.requires_grad_(), weight, target, impl="chunked")
    with Allocations() as allocations:
        logps.sum().backward()
    assert allocations.largest < weight.nbytes / 50
    assert allocations.peak < weight.nbytes / 20


def test_frozen_hidden_states_allocate_no_gradient_of_their_size(chunks: Callable[[str], None]) -> None:
    chunks("small")
    hidden, weight, _, target, _ = _inputs(rows=500, size=300, vocabulary=20)
    logps = linear_logprob(hidden, weight.requires_grad_(), target, impl="chunked")
    with Allocations() as allocations:
        logps.sum().backward()
    assert allocations.largest <= weight.nbytes
    assert allocations.peak < hidden.nbytes / 4


def test_no_gradient_needs_no_graph() -> None:
    hidden, weight, _, target, _ = _inputs()
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, target, impl="chunked").requires_grad


def test_changing_the_weight_before_backward_is_caught() -> None:
    hidden, weight, _, target, _ = _inputs()
    logps = linear_logprob(hidden.requires_grad_(), weight, target, impl="chunked")
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_gradients_of_gradients_are_refused_not_wrong() -> None:
    hidden, weight, _, target, _ = _inputs()
    logps = linear_logprob(hidden.requires_grad_(), weight, target, impl="chunked")
    (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_casts_and_nothing_else(impl: str) -> None:
    hidden, weight, bias, target, upstream = _inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logprob(hidden, weight, target, bias=bias, impl=impl)
    assert logps.dtype == torch.float32
    gradients = torch.autograd.grad(logps, leaves, upstream.float())
    narrow = [hidden.bfloat16(), weight.bfloat16(), bias]
    expected = linear_logprob(narrow[0], narrow[1], target, bias=bias, impl=impl)
    assert torch.equal(logps, expected)
    for leaf, ours, theirs in zip(
        leaves, gradients, torch.autograd.grad(expected, leaves, upstream.float()), strict=True
    ):
        assert ours.dtype == leaf.dtype
        assert torch.equal(ours, theirs)


def test_backward_inside_autocast_is_the_same() -> None:
    hidden, weight, _, target, _ = _inputs()
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outside, inside = (linear_logprob(hidden, weight, target, impl="chunked") for _ in range(2))
        (inside_gradient,) = torch.autograd.grad(inside.sum(), hidden)
    (outside_gradient,) = torch.autograd.grad(outside.sum(), hidden)
    assert torch.equal(inside_gradient, outside_gradient)


def _bad(**changes: Any) -> dict[str, Any]:
    hidden, weight, bias, target, _ = _inputs()
    return {"hidden": hidden, "weight": weight, "target": target, "bias": bias} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(R, D + 1)}, r"with the same D, got \(23, 38\) and \(131, 37\)"),
        ({"hidden": torch.ones(1, R, D)}, r"hidden must be \(R, D\)"),
        ({"weight": torch.ones(V)}, r"weight \(V, D\)"),
        ({"target": torch.zeros(R - 1, dtype=torch.int64)}, r"target must be \(23,\) int64, got \(22,\)"),
        ({"target": torch.zeros(R, dtype=torch.int32)}, "int64, got .* torch.int32"),
        ({"bias": torch.ones(V + 1)}, r"bias must be \(131,\), got \(132,\)"),
        ({"bias": torch.ones(V, dtype=torch.int64)}, "bias must be a floating point tensor, got torch.int64"),
        ({"hidden": torch.ones(R, D, dtype=torch.int64)}, "hidden must be a floating point tensor"),
        ({"hidden": torch.ones(R, D, dtype=torch.bfloat16)}, "hidden is torch.bfloat16 and weight is torch.float32"),
        ({"weight": torch.ones(V, D, device="meta")}, "on one device, got cpu, meta"),
        ({"target": torch.full((R,), V)}, r"target holds 131, outside the vocabulary 0\.\.130"),
        ({"target": torch.full((R,), -100)}, r"target holds -100, outside the vocabulary 0\.\.130"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"softcap": -3.0}, "softcap must be positive, got -3.0"),
        ({"softcap": float("nan")}, "softcap must be positive, got nan"),
        ({"logit_scale": float("inf")}, "logit_scale must be finite, got inf"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite, got nan"),
        ({"impl": "fast"}, "no implementation 'fast' of operation 'linear_logprob'"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(**_bad(**changes))


def test_one_bad_target_among_many_is_named() -> None:
    target = torch.zeros(R, dtype=torch.int64)
    target[17] = 4711
    with pytest.raises(ValueError, match="target holds 4711"):
        linear_logprob(**_bad(target=target))


def test_an_unknown_implementation_is_refused_for_no_rows() -> None:
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        linear_logprob(torch.ones(0, D), torch.ones(V, D), torch.empty(0, dtype=torch.int64), impl="fast")
