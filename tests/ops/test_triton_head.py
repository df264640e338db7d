"""The head in Triton, in the interpreter on small shapes: over many chunks, at the edges, and what torch asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdpo_kernels import _dispatch, linear_logprob, use_impl
from tests.allocations import Allocations
from tests.numerics import assert_as_good_as_eager, eager_logprob, value_and_gradients

pytest.importorskip("triton")
from stepdpo_kernels.ops.linear_logprob import triton_chunked, triton_kernel

pytestmark = pytest.mark.skipif(not triton_kernel.INTERPRETED, reason="for Triton's interpreter")

IMPLS = ["triton_chunked", "triton_fused"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
R, D, V = 45, 37, 301  # nothing divides anything


def _inputs(
    dtype: torch.dtype = torch.float32, rows: int = R, size: int = D, vocabulary: int = V
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target, and an upstream gradient of either sign with zeros in it."""
    hidden, weight, bias, upstream = (
        torch.randn(*s) for s in ((rows, size), (vocabulary, size), (vocabulary,), (rows,))
    )
    target = torch.randint(vocabulary, (rows,))
    target[:2] = torch.tensor([0, vocabulary - 1])[:rows]
    upstream[::5] = 0
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target, upstream


def _call(op: Callable[..., Tensor], target: Tensor, **options: Any) -> Callable[..., Tensor]:
    return lambda hidden, weight, bias=None: op(hidden, weight, target, bias=bias, **options)


def _check(impl: str, dtype: torch.dtype, inputs: tuple[Tensor, ...], bias: bool = False, **options: Any) -> None:
    hidden, weight, bias_, target, upstream = inputs
    leaves = [hidden, weight] + [bias_] * bias
    ours = value_and_gradients(_call(linear_logprob, target, impl=impl, **options), leaves, upstream)
    eager = value_and_gradients(_call(eager_logprob, target, **options), leaves, upstream)
    oracle = value_and_gradients(_call(eager_logprob, target, **options), leaves, upstream, torch.float64)
    assert ours[0].dtype == torch.float32
    for gradient, leaf in zip(ours[1:], leaves, strict=True):
        assert gradient.dtype == leaf.dtype
    for name, *of in zip(["log-probs", "dX", "dW", "db"], ours, eager, oracle, strict=False):
        assert_as_good_as_eager(name, *of, dtype)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows in forward; of 128 (fused) and 24 (chunked) columns in backward."""
    monkeypatch.setattr(triton_chunked, "CHUNK_ROWS", 16)
    monkeypatch.setattr(triton_chunked, "chunk_rows", lambda vocabulary, device: 16)
    monkeypatch.setattr(triton_chunked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_chunked, "MIN_COLUMNS", 24)
    monkeypatch.setattr(triton_kernel, "Q_BYTES", 1)
    monkeypatch.setattr(triton_kernel, "MIN_COLUMNS", 1)
    monkeypatch.setattr(triton_kernel, "SUM_ROWS", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0, "logit_scale": -0.7}], ids=["plain", "all"])
@pytest.mark.parametrize("size", [D, 6, 64], ids=lambda size: f"D{size}")  # at D = 6 twelve rows are kept
@pytest.mark.parametrize("impl", IMPLS)
def test_over_many_chunks(impl: str, size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    _check(impl, dtype, _inputs(dtype, size=size), **options)


@pytest.mark.parametrize(("rows", "size", "dtype", "kept"), [
    (1000, 896, torch.bfloat16, 1000),
    (1000, 896, torch.float32, 1000),
    (8192, 896, torch.bfloat16, 4096),
    (8192, 896, torch.float32, 2048),
    (9000, 4096, torch.bfloat16, 8192),
    (9000, 4096, torch.float32, 4096),
    (1, 8, torch.float32, 1),
])  # fmt: skip
def test_what_is_kept_fits_its_bound(rows: int, size: int, dtype: torch.dtype, kept: int) -> None:
    assert triton_chunked.kept_rows(rows, torch.empty(9, size, dtype=dtype)) == kept
    assert kept * dtype.itemsize <= 2 * max(2 * size, 4 * triton_chunked.CHUNK_ROWS)


def test_rows_of_a_chunk_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for gigabytes, vocabulary, rows in ((80, 151_936, 1024), (16, 151_936, 1024), (8, 151_936, 512), (1, 10**6, 128)):
        properties = type("Properties", (), {"total_memory": gigabytes << 30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert triton_chunked.chunk_rows(vocabulary, torch.device("cuda")) == rows


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_policy_and_reference_have_the_same_bits(impl: str, dtype: torch.dtype) -> None:
    hidden, weight, _, target, _ = _inputs(dtype, size=6)
    results = []
    for learns in ((), (hidden,), (weight,), (hidden, weight)):
        for x in (hidden, weight):
            x.requires_grad_(any(x is y for y in learns))
        results.append(linear_logprob(hidden, weight, target, impl=impl).detach())
    with torch.no_grad():
        results.append(linear_logprob(hidden, weight, target, impl=impl))
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_bits_every_time_and_inputs_untouched(impl: str) -> None:
    hidden, weight, bias, target, upstream = _inputs(torch.bfloat16)
    before = [x.clone() for x in (hidden, weight, bias, target)]
    call = _call(linear_logprob, target, softcap=4.0, impl=impl)
    first, again = (value_and_gradients(call, [hidden, weight, bias], upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, bias, target), strict=True))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_frozen_gets_no_gradient(impl: str, frozen: tuple[int, ...]) -> None:
    *leaves, target, upstream = _inputs(size=12)
    full = value_and_gradients(_call(eager_logprob, target), leaves, upstream, torch.float64)[1:]
    learning = [i for i in range(3) if i not in frozen]
    for i in learning:
        leaves[i].requires_grad_()
    logps = linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], impl=impl)
    gradients = torch.autograd.grad(logps, [leaves[i] for i in learning], upstream)
    for i, gradient in zip(learning, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), full[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_weight_costs_no_memory_of_its_size(impl: str) -> None:
    hidden, weight, _, target, _ = _inputs(rows=8, size=300, vocabulary=1000)
    hidden.requires_grad_()
    with Allocations() as allocations:
        linear_logprob(hidden, weight, target, impl=impl).sum().backward()
    assert allocations.peak < weight.nbytes / 2
    assert hidden.grad is not None


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [-1e4, 1e4, -50.0])
def test_no_phantom_logits(impl: str, offset: float) -> None:
    # with every true logit far below zero a padded column of zeros would take all the probability
    hidden, weight, bias, target, _ = _inputs()
    shifted = linear_logprob(hidden, weight, target, bias=torch.full_like(bias, offset), impl=impl)
    plain = eager_logprob(hidden.double(), weight.double(), target)
    torch.testing.assert_close(shifted.double(), plain, rtol=1e-6, atol=2 * abs(offset) * 2**-23 + 1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_logits(impl: str) -> None:
    # a bias of -inf bars tokens, also the whole first tile and the whole last one
    hidden, weight, bias, target, upstream = _inputs()
    bias[:140] = bias[260:] = -torch.inf
    target = 140 + target % 120
    ours = value_and_gradients(_call(linear_logprob, target, impl=impl), [hidden, weight, bias], upstream)
    inside = [hidden, weight[140:260], bias[140:260]]
    plain = value_and_gradients(_call(eager_logprob, target - 140), inside, upstream, torch.float64)
    torch.testing.assert_close(ours[0].double(), plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), plain[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2][140:260].double(), plain[2], rtol=1e-5, atol=1e-5)
    assert not ours[2][:140].any()
    assert not ours[2][260:].any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 300.0, "logit_scale": 1.2}], ids=["plain", "all"])
@pytest.mark.parametrize("impl", IMPLS)
def test_targets_far_below_the_maximum(impl: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Log-probs from 0 to -250: by more than exp has range for, by more than HEADROOM, by less, and of the maximum."""
    hidden, weight, bias, target, upstream = _inputs(dtype, size=64)
    hidden = (torch.linspace(0.1, 12, R)[:, None] * hidden).to(dtype)
    logits = hidden.double() @ weight.double().T
    weight *= 2 / 8
    ranks = logits.argsort(dim=1, descending=True)
    target = torch.where(torch.arange(R) % 3 == 0, ranks[:, 0], ranks[:, 300])
    logps = eager_logprob(hidden.double(), weight.double(), target)
    assert logps.max() > -1
    assert logps.min() < -100
    assert ((logps < -45) & (logps > -80)).any()
    _check(impl, dtype, (hidden, weight, bias, target, upstream), **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_likely_target_has_all_the_digits_of_its_log_prob(impl: str) -> None:
    hidden, weight = torch.eye(3), torch.tensor([[0.0, -14.0, -40.0], [-30.0, 0.0, 0.0], [-31.0, -15.0, -41.0]])
    target = torch.tensor([0, 1, 1])
    logits = weight.T.double()
    relative = logits - logits.gather(1, target[:, None])
    exact = -relative.scatter(1, target[:, None], -torch.inf).exp().sum(dim=1).log1p()
    ours = linear_logprob(hidden, weight, target, impl=impl)
    if impl == "triton_chunked":  # relative to the target, so 1 + s is never rounded
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-30)
    else:
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_that_cannot_be(dtype: torch.dtype) -> None:
    """Of probability 0 by its bias, whatever the others are: -inf, and gradients as of the reference."""
    hidden, weight, bias, target, upstream = _inputs(dtype)
    bias[target[7]] = -torch.inf
    for offset in (0.0, -150.0, 150.0):
        shifted = (bias.float() + offset).to(dtype)
        leaves = [hidden, weight, shifted]
        ours = value_and_gradients(_call(linear_logprob, target, impl="triton_chunked"), leaves, upstream)
        exact = value_and_gradients(_call(eager_logprob, target), leaves, upstream, torch.float64)
        assert ours[0][7] == -torch.inf
        for one, other in zip(ours[1:], exact[1:], strict=True):
            assert (one.double() - other).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * other.norm()


def test_rounding_the_target_is_undone() -> None:
    """The target's Q is the largest of its row: what plain rounding of Q costs Q W is mostly that."""
    hidden, weight, _, target, upstream = _inputs(torch.bfloat16, rows=64, size=64, vocabulary=400)
    weight = (weight.float() / 8).bfloat16()
    _, stats, product, _ = triton_chunked._forward(hidden, weight, target, None, None, None, True, False)
    ours = (upstream * stats[2])[:, None] * product
    exact = value_and_gradients(_call(eager_logprob, target), [hidden, weight], upstream, torch.float64)[1]
    logits = hidden.double() @ weight.double().T
    e = (logits - logits.gather(1, target[:, None])).exp()
    q = -e.scatter(1, target[:, None], 0.0)
    others = -q.sum(dim=1)
    q.scatter_(1, target[:, None], others[:, None])
    rounded = (upstream.double() / (1 + others))[:, None] * (q.bfloat16().double() @ weight.double())
    assert (ours.double() - exact).norm() < 0.5 * (rounded - exact).norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_is_seen(impl: str) -> None:
    hidden, weight, _, target, _ = _inputs()
    hidden[3, 5] = torch.nan
    logps = linear_logprob(hidden, weight, target, impl=impl)
    assert logps.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_and_gradient_need_not_be_contiguous(impl: str) -> None:
    hidden, weight, bias, target, _ = _inputs()
    layouts = [
        hidden.T.contiguous().T,
        torch.cat([weight, weight], dim=1)[:, :D],
        torch.stack([bias, bias], dim=1)[:, 0],
    ]
    strided = torch.stack([target, target], dim=1)[:, 1]
    assert not any(x.is_contiguous() for x in [*layouts, strided])
    for x in (*layouts, hidden, weight, bias):
        x.requires_grad_()
    ours = linear_logprob(layouts[0], layouts[1], strided, bias=layouts[2], impl=impl)
    plain = linear_logprob(hidden, weight, target, bias=bias, impl="reference")
    torch.testing.assert_close(ours, plain)
    gradients = torch.autograd.grad(ours.sum(), layouts)  # the gradient of a sum is one number, expanded
    expected = torch.autograd.grad(plain.sum(), [hidden, weight, bias])
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_one_token(impl: str) -> None:
    hidden, weight, *_ = (x.requires_grad_() for x in _inputs()[:2])
    nothing = linear_logprob(hidden[:0], weight, torch.empty(0, dtype=torch.int64), impl=impl)
    for gradient in torch.autograd.grad(nothing.sum(), [hidden, weight]):
        assert not gradient.any()
    certain = linear_logprob(hidden, weight[:1], torch.zeros(R, dtype=torch.int64), impl=impl)
    assert not certain.any()
    for gradient in torch.autograd.grad(certain.sum(), [hidden, weight]):
        assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_gradients_are_refused_not_wrong(impl: str) -> None:
    hidden, weight, _, target, _ = _inputs()
    logps = linear_logprob(hidden.requires_grad_(), weight, target, impl=impl)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl: str) -> None:
    hidden, weight, _, target, upstream = _inputs()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logprob(hidden, weight, target, impl=impl)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target, impl=impl)
    assert torch.equal(logps, expected)
    for gradient in torch.autograd.grad(logps, leaves, upstream):
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_inside_autocast_is_the_same(impl: str) -> None:
    hidden, weight, _, target, upstream = _inputs()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    outside, inside = (linear_logprob(hidden, weight, target, impl=impl) for _ in range(2))
    expected = torch.autograd.grad(outside, leaves, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(inside, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_hidden_state_for_all_rows(impl: str) -> None:
    _, weight, *_ = _inputs(torch.bfloat16, size=64)
    target = torch.randint(V, (R,))
    rows = weight[:1].expand(R, 64)  # a stride of 0, which no descriptor takes
    expected = linear_logprob(rows.contiguous(), weight, target, impl=impl)
    assert torch.equal(linear_logprob(rows, weight, target, impl=impl), expected)


@pytest.mark.parametrize("learns", ["both", "hidden"])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str, learns: str) -> None:
    # rows of 16 tokens are not padded, so that every byte of what is kept is written and can be compared
    hidden, weight, bias, target, _ = _inputs(rows=5, size=4, vocabulary=16)
    hidden.requires_grad_()
    weight.requires_grad_(learns == "both")
    both = learns == "both"
    if impl == "triton_fused":
        torch.library.opcheck(triton_kernel._fused, (hidden, weight, target, bias, 3.0, 0.5))
    else:
        torch.library.opcheck(triton_chunked._forward, (hidden, weight, target, bias, 3.0, 0.5, True, both))


@pytest.mark.parametrize("impl", [*IMPLS, "auto", "chunked", "reference"])
def test_compiles_without_a_graph_break(impl: str) -> None:
    hidden, weight, _, target, _ = _inputs()

    def step(h: Tensor, w: Tensor) -> Tensor:
        return (linear_logprob(torch.tanh(h), w, target, impl=impl) * 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_why_not() -> None:
    hidden, weight, bias, target, _ = _inputs()
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    assert triton_kernel.why_not(arguments) == []
    double = {name: x.double() for name, x in arguments.items()}
    assert "hidden is torch.float64" in triton_kernel.why_not(double)[0]
    assert "bias is torch.float64" in triton_kernel.why_not(double)[1]


def test_auto_leaves_the_interpreter_alone() -> None:
    hidden, weight, _, target, _ = _inputs()
    chosen = _dispatch.choose(
        "linear_logprob", "auto", {"hidden": hidden, "weight": weight, "target": target, "bias": None}
    )
    assert chosen.name not in IMPLS
    with use_impl("triton_fused"):
        named = linear_logprob(hidden, weight, target)
    assert torch.equal(named, linear_logprob(hidden, weight, target, impl="triton_fused"))
