"""A loss whose gradients are taken in forward, group by group: numerics, products, bits, what is frozen, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepdpo_kernels.ops.linear_logprob import api, cpu_kernel, grouped_logprob, in_forward, linear_logprob, linear_loss
from tests.numerics import assert_as_good_as_eager, eager_logprob, value_and_gradients

try:
    from stepdpo_kernels.ops.linear_logprob import triton_chunked, triton_kernel
except ModuleNotFoundError:
    interpreted = False
else:
    interpreted = triton_kernel.INTERPRETED
IMPLS = [
    pytest.param("cpu", marks=pytest.mark.skipif(cpu_kernel._missing is not None, reason=str(cpu_kernel._missing))),
    pytest.param("triton_chunked", marks=pytest.mark.skipif(not interpreted, reason="for Triton's interpreter")),
]
DTYPES = [torch.float32, torch.bfloat16]
ENDS = (15, 31, 45, 52, 78, 100)  # groups, which are joined to as many rows as may be kept
V = 150
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "all": {"bias": True, "softcap": 5.0, "logit_scale": -0.7}}


@pytest.fixture(autouse=True)
def _little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 32 rows, of which each implementation keeps what it needs."""
    monkeypatch.setattr(cpu_kernel, "group_rows", lambda weight: 32)
    monkeypatch.setattr(cpu_kernel, "LEAST_WORK", 0)
    monkeypatch.setattr(cpu_kernel, "kept_rows", lambda rows, weight: min(rows, 32))
    if interpreted:
        monkeypatch.setattr(triton_chunked, "LEAST_WORK", 0)
        monkeypatch.setattr(triton_chunked, "kept_rows", lambda rows, weight: min(rows, 32))
        monkeypatch.setattr(triton_chunked, "chunk_rows", lambda vocabulary, device: 24)
        monkeypatch.setattr(triton_chunked, "MIN_COLUMNS", 64)
        monkeypatch.setattr(triton_chunked, "CHUNK_BYTES", 1)


def _inputs(dtype: torch.dtype, size: int = 70) -> list[Tensor]:
    """hidden, weight, bias, target, reference log-probs of the groups"""
    rows = ENDS[-1]
    made = [torch.randn(*shape) for shape in ((rows, size), (V, size), (V,))]
    made[1] *= size**-0.5
    return [*(x.to(dtype) for x in made), torch.randint(V, (rows,)), torch.randn(len(ENDS))]


def _loss(refs: Tensor, ends: Sequence[int] = ENDS) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Of the margin of each group, half of its log-probs minus the other half: what a pair is; and the margins."""
    signs = torch.cat([torch.tensor([1.0, -1.0]).repeat(b - a)[: b - a] for a, b in pairwise([0, *ends])])

    def loss_of(logps: Tensor) -> tuple[Tensor, Tensor]:
        parts = (signs * logps).split([b - a for a, b in pairwise([0, *ends])])
        margins = torch.stack([part.sum() for part in parts]) - refs.to(logps.dtype)
        return -torch.nn.functional.logsigmoid(0.3 * margins).mean(), margins.detach()

    return loss_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ends", [ENDS, (15, 75, 100)], ids=["groups", "a group too large to be kept"])
@pytest.mark.parametrize("impl", IMPLS)
def test_as_good_as_eager(impl: str, ends: Sequence[int], options: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, target, refs = _inputs(dtype)
    given_ = dict(OPTIONS[options])
    leaves = [hidden, weight] + ([bias] if given_.pop("bias", False) else [])
    loss_of = _loss(refs[: len(ends)], ends)

    def ours(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        loss, margins = linear_loss(h, w, target, ends, loss_of, bias=b, impl=impl, **given_)
        assert type(loss.grad_fn).__name__ == "ReadyBackward"
        assert torch.equal(loss, -torch.nn.functional.logsigmoid(0.3 * margins).mean())
        return loss

    def eager(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return loss_of(eager_logprob(h, w, target, bias=b, **given_))[0]

    upstream = torch.tensor(-1.7)
    results = (
        value_and_gradients(ours, leaves, upstream),
        value_and_gradients(eager, leaves, upstream),
        value_and_gradients(eager, leaves, upstream, torch.float64),
    )
    for leaf, gradient in zip(leaves, results[0][1:], strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    for name, *of in zip(["loss", "dX", "dW", "db"], *results, strict=False):
        assert_as_good_as_eager(name, *of, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_are_float32(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dW of 25 groups is as good as that of one: adding up what each of them rounds is several times further off."""
    ends = range(4, ENDS[-1] + 1, 4)
    monkeypatch.setattr(cpu_kernel, "group_rows", lambda weight: 4)
    if interpreted:
        monkeypatch.setattr(triton_chunked, "group_rows", lambda weight: 4)
    hidden, weight, _, target, _ = _inputs(torch.bfloat16)
    loss_of = _loss(torch.zeros(len(ends)), ends)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    (oracle,) = torch.autograd.grad(loss_of(eager_logprob(*exact, target))[0], exact[1])
    errors = []
    for groups in (ends, ()):
        loss, _ = linear_loss(*leaves, target, groups, loss_of, impl=impl)
        assert (type(loss.grad_fn).__name__ == "ReadyBackward") == bool(groups)
        errors.append((torch.autograd.grad(loss, weight)[0].double() - oracle).norm())
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_frozen_gets_no_gradient(impl: str, frozen: tuple[int, ...]) -> None:
    *leaves, target, refs = _inputs(torch.float32)
    for i, x in enumerate(leaves):
        x.requires_grad_(i not in frozen)
    loss, _ = linear_loss(*leaves[:2], target, ENDS, _loss(refs), bias=leaves[2], impl=impl)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    oracle = torch.autograd.grad(_loss(refs)(eager_logprob(*exact[:2], target, bias=exact[2]))[0], exact)
    for i, x in enumerate(leaves):
        if i in frozen:
            assert x.grad is None
        else:
            assert x.grad is not None
            torch.testing.assert_close(x.grad.double(), oracle[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_retained_graph_gives_the_same_bits_again(impl: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, target, refs = _inputs(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss, _ = linear_loss(hidden, weight, target, ENDS, _loss(refs), bias=bias, impl=impl)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in once]
    again = torch.autograd.grad(2 * loss, leaves)
    for first, before, second in zip(once, kept, again, strict=True):
        assert torch.equal(first, before)  # what was handed on stays
        assert torch.equal(second, 2 * first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_by_groups_take_any_gradient(impl: str, dtype: torch.dtype) -> None:
    """As good as those of all rows at once, dW in one float32 sum; and of the loss's gradient the same bits."""
    hidden, weight, bias, target, refs = _inputs(dtype)
    upstream = torch.randn(len(target))

    def call(op: Callable[..., Tensor], *more: Any, **options: Any) -> Callable[..., Tensor]:
        return lambda h, w, b: op(h, w, target, *more, bias=b, **options)

    ways = (call(grouped_logprob, ENDS, impl=impl), call(linear_logprob, impl=impl), call(eager_logprob))
    leaves = [hidden, weight, bias]
    results = [value_and_gradients(way, leaves, upstream) for way in ways]
    oracle = value_and_gradients(ways[2], leaves, upstream, torch.float64)
    for name, ours, at_once, eager, exact in zip(["logp", "dX", "dW", "db"], *results, oracle, strict=True):
        assert_as_good_as_eager(name, ours, eager, exact, dtype)
        assert (ours.double() - exact).norm() <= 1.2 * (at_once.double() - exact).norm() + 1e-6 * exact.norm()
    leaves = [x.requires_grad_() for x in leaves]
    logps = grouped_logprob(hidden, weight, target, ENDS, bias=bias, impl=impl)
    loss, _ = linear_loss(hidden, weight, target, ENDS, _loss(refs), bias=bias, impl=impl)
    of_logps = torch.autograd.grad(_loss(refs)(logps)[0], leaves)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), of_logps, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_it_computes_it_once_more(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once more for each group, whose small graph is no business of the checkpoint."""
    hidden, weight, _, target, refs = _inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    impl = "chunked" if cpu_kernel._missing else "cpu"
    calls: list[int] = []

    def function(h: Tensor, w: Tensor) -> Tensor:
        calls.append(1)
        return linear_loss(torch.tanh(h), w, target, ENDS, _loss(refs), impl=impl)[0]

    plain = torch.autograd.grad(function(*leaves), leaves)
    calls.clear()
    loss = checkpoint(function, *leaves, use_reentrant=reentrant)
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    for leaf, expected in zip(leaves, plain, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)


@pytest.mark.skipif(not interpreted, reason="for Triton's interpreter")
def test_float16_waits_for_the_scale_of_the_loss() -> None:
    """Gradients of an unscaled loss would be lost in float16: most of these are below 6e-8."""
    hidden, weight, _, target, refs = _inputs(torch.float16)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    far, scale = refs - 60, 2.0**16
    loss, _ = linear_loss(*leaves, target, ENDS, _loss(far), impl="triton_chunked")
    ours = torch.autograd.grad(scale * loss, leaves)
    oracle = torch.autograd.grad(scale * _loss(far)(eager_logprob(*exact, target))[0], exact)
    for one, other in zip(ours, oracle, strict=True):
        assert (other.abs() / scale < 6e-8).double().mean() > 0.5
        assert (one.double() - other).norm() < 2e-3 * other.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_bits_do_not_depend_on_what_is_trained(impl: str, dtype: torch.dtype) -> None:
    hidden, weight, _, target, _ = _inputs(dtype)
    seen: list[Tensor] = []

    def loss_of(logps: Tensor) -> tuple[Tensor, Tensor]:
        return logps.sum(), logps.detach()

    for learns in ((False, False), (True, False), (False, True), (True, True)):
        leaves = [x.detach().requires_grad_(needed) for x, needed in zip((hidden, weight), learns, strict=True)]
        seen.append(linear_loss(*leaves, target, ENDS, loss_of, impl=impl)[1])
    with torch.no_grad():
        seen.append(linear_loss(hidden, weight, target, ENDS, loss_of, impl=impl)[1])
    seen.append(grouped_logprob(hidden, weight, target, ENDS, impl=impl))
    assert all(torch.equal(seen[0], x) for x in seen[1:])


@pytest.mark.skipif(not interpreted, reason="for Triton's interpreter")
@pytest.mark.parametrize(("learns", "products"), [((True, True), 3), ((False, True), 2), ((True, False), 2)])
def test_three_products_for_any_number_of_rows(
    learns: tuple[bool, bool], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, target, refs = _inputs(torch.float32)
    counted = []

    def count(function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def counting(*operands: Any, **options: Any) -> Any:
            a, b = operands[which], operands[which + 1]
            counted.append(a.shape[0] * a.shape[1] * b.shape[1])
            return function(*operands, **options)

        return counting

    monkeypatch.setattr(triton_chunked, "product", count(triton_kernel.product, 0))
    monkeypatch.setattr(triton_chunked, "add_product", count(triton_kernel.add_product, 1))
    leaves = [x.requires_grad_(needed) for x, needed in zip((hidden, weight), learns, strict=True)]
    loss, _ = linear_loss(*leaves, target, ENDS, _loss(refs), impl="triton_chunked")
    loss.backward()
    if learns == (True, False):  # as autograd has it: dW, which is not wanted, would be a torch.mm
        assert type(loss.grad_fn).__name__ != "ReadyBackward"
    assert sum(counted) == products * hidden.shape[0] * hidden.shape[1] * V


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ends", [(), (100,)], ids=["no groups", "one group"])
def test_without_groups_it_is_autograd(impl: str, ends: Sequence[int]) -> None:
    hidden, weight, _, target, refs = _inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_loss(*leaves, target, ends, _loss(refs), impl=impl)
    plain = _loss(refs)(linear_logprob(*leaves, target, impl=impl))[0]
    assert torch.equal(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(ours, theirs)


def test_ends_are_asked_for_only_where_there_are_groups() -> None:
    hidden, weight, _, target, _ = _inputs(torch.float32)

    def unasked() -> Sequence[int]:
        raise AssertionError("asked")

    for impl, rows in (("reference", 100), ("chunked", 100), ("auto", 20)):
        loss, logps = linear_loss(
            hidden[:rows], weight, target[:rows], unasked, lambda logps: (logps.sum(), logps), impl=impl
        )
        assert torch.equal(loss, logps.sum())


def test_no_second_derivative() -> None:
    hidden, weight, _, target, refs = _inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_loss(*leaves, target, ENDS, _loss(refs))
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        torch.autograd.grad(grouped_logprob(*leaves, target, ENDS).sum(), leaves, create_graph=True)


def test_under_autocast() -> None:
    hidden, weight, _, target, refs = _inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_loss(*leaves, target, ENDS, _loss(refs))
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
    plain, _ = linear_loss(*rounded, target, ENDS, _loss(refs))
    assert torch.equal(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, rounded), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_groups_are_joined(sizes: list[int], limit: int) -> None:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    edges = in_forward.join_groups(ends, ends[-1], limit)
    assert edges[0] == 0
    assert edges[-1] == ends[-1]
    assert set(edges[1:]) <= set(ends)
    assert edges == sorted(set(edges))
    for start, stop in pairwise(edges):
        alone = (start == 0 and stop == ends[0]) or (start in ends and ends.index(stop) == ends.index(start) + 1)
        assert stop - start <= limit or alone
    for start, _, stop in zip(edges, edges[1:], edges[2:], strict=False):
        assert stop - start > limit or stop == edges[-1]  # two neighbours would not have fitted
    assert in_forward.join_groups((), 7, limit) == [0, 7]


@pytest.mark.parametrize(
    ("impl", "dtype", "size", "kept", "group"),
    [
        ("cpu", torch.bfloat16, 576, 1664, 512),  # E of 512 rows in the memory of dW, of 1,152 in that of a float32 one
        ("cpu", torch.float32, 576, 1024, 512),
        ("triton_chunked", torch.bfloat16, 576, 4096, 4096),
        ("triton_chunked", torch.float32, 576, 2048, 2048),
        ("triton_chunked", torch.bfloat16, 3584, 7168, 7168),
        ("triton_chunked", torch.float32, 3584, 3584, 3584),
    ],
)
def test_where_groups_begin(
    impl: str, dtype: torch.dtype, size: int, kept: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a quarter more rows than are kept, of sizes that there are, where a product of a group takes its time."""
    monkeypatch.undo()
    if impl == "triton_chunked" and not interpreted:
        pytest.skip("needs triton")

    def edges(rows: int, of: torch.dtype = dtype, vocabulary: int = 1 << 17) -> list[int] | None:
        hidden, weight = (torch.empty(1, 1, dtype=of).expand(n, size) for n in (rows, vocabulary))
        problem = api._Problem(hidden, weight, None, torch.empty(rows), {}, impl, False, linear_logprob)
        return api._edges(problem, [*range(64, rows, 64), rows])

    most = 5 * kept // 4
    assert edges(most) is None
    assert edges(most + 1) == [*range(0, most + 1, group), most + 1]
    assert edges(most + 1, torch.float16) is None
    assert edges(most + 1, vocabulary=300) is None
