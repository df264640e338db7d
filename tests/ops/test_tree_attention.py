"""Tree attention against plain causal attention over each branch, encoded on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.tree_attention import cpu, tree_attention
from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import Ragged, StepPair, TreePlan
from tests.forests import forest_pairs, make_pair, nested_pairs, step_pairs
from tests.numerics import assert_as_good_as_eager, value_and_gradients

HEADS = {"multi-head": (4, 4), "grouped": (4, 2), "multi-query": (3, 1)}
WINDOWS = [None, 1, 2, 5, 17, 1000]


def _plan(pairs: Sequence[StepPair], share: str = "tree") -> TreePlan:
    return build_batch(pairs, range(len(pairs)), share).plan


def _star(leaves: int, root: int = 3, tail: int = 2) -> TreePlan:
    """One prefix with many short leaves."""
    pairs = [make_pair([1] * root, [10 + 2 * i] * (tail + 1), [11 + 2 * i] * (tail + 1)) for i in range(leaves // 2)]
    return _plan(pairs)


PLANS = {
    "forest": _plan(forest_pairs()),
    "pairs": _plan(forest_pairs(), "pair"),
    "unshared": _plan(nested_pairs(), "none"),
    "one leaf": _plan([make_pair([1, 2, 3], [4, 5], [4, 5])]),
    "one token": _plan([make_pair([1], [2], [3])]),
    "star": _star(12),
}


def _qkv(
    plan: TreePlan, heads: tuple[int, int] = (4, 2), size: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(plan.num_tokens)
    query, key, value = (
        torch.randn(plan.num_tokens, h, size, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads[0], heads[1], heads[1])
    )
    return [query, key, value]


def _branch_by_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Every root-to-leaf path as a sequence of its own, all of its tokens as queries, in the dtype of the inputs."""
    outputs: dict[int, Tensor] = {}
    group = query.shape[1] // key.shape[1]
    cuts = plan.cu_k.tolist()
    for start, stop in pairwise(cuts):
        path = plan.keys.index[start:stop]
        q = query[path].transpose(0, 1)  # (H, n, d)
        k, v = (x[path].repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
        n = len(path)
        barred = torch.ones(n, n, dtype=torch.bool).triu(1)
        if window is not None:
            barred |= torch.ones(n, n, dtype=torch.bool).tril(-window)
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(barred, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], dim=2)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        out = (weights[:, :, :n] @ v).transpose(0, 1)
        for i, position in enumerate(path.tolist()):
            # the root of many paths is computed many times; any of them will do
            outputs[position] = out[i]
    return torch.stack([outputs[position] for position in range(plan.num_tokens)])


def _close(plan: TreePlan, heads: tuple[int, int], window: int | None, impl: str, scale: float = 0.3) -> None:
    qkv = _qkv(plan, heads)
    upstream = torch.randn_like(qkv[0])
    ours = value_and_gradients(
        lambda q, k, v: tree_attention(q, k, v, plan, scale=scale, sliding_window=window, impl=impl), qkv, upstream
    )
    oracle = value_and_gradients(lambda q, k, v: _branch_by_branch(q, k, v, plan, scale, window), qkv, upstream)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_every_branch_sees_itself_and_nothing_else(
    impl: str, plan: TreePlan, heads: tuple[int, int], window: int | None
) -> None:
    _close(plan, heads, window, impl)


@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_windows_beyond_int32(impl: str, window: int) -> None:
    plan = PLANS["forest"]
    qkv = _qkv(plan)
    windowed, plain = (
        value_and_gradients(
            lambda q, k, v, w=w: tree_attention(q, k, v, plan, scale=0.3, sliding_window=w, impl=impl), qkv, qkv[0]
        )
        for w in (window, None)
    )
    for a, b in zip(windowed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


OPTIONS = {"softcap": (1.5, False), "sinks": (None, True), "both": (1.5, True)}


def _with_sinks(qkv: list[Tensor], sinks: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = qkv[0].shape[1]
    return [*qkv, torch.randn(heads, generator=generator, dtype=torch.float64).to(qkv[0].dtype)] if sinks else qkv


@pytest.mark.parametrize("window", [None, 2, 17])
@pytest.mark.parametrize(("softcap", "sinks"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", [(8, 8), (8, 5), (3, 16)], ids=str)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_softcap_and_sinks(
    impl: str, plan: TreePlan, sizes: tuple[int, int], softcap: float | None, sinks: bool, window: int | None
) -> None:
    inputs = _with_sinks([*_qkv(plan, size=sizes[0])[:2], _qkv(plan, size=sizes[1])[2]], sinks)
    upstream = torch.randn(plan.num_tokens, 4, sizes[1], dtype=torch.float64)

    def ours(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "sinks": s}
        return tree_attention(q, k, v, plan, scale=0.8, impl=impl, **options)

    def oracle(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return _branch_by_branch(q, k, v, plan, 0.8, window, softcap, s)

    for a, b in zip(*(value_and_gradients(f, inputs, upstream) for f in (ours, oracle)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(step_pairs(), st.sampled_from(["tree", "pair", "none"]), st.one_of(st.none(), st.integers(1, 9)))
def test_any_forest(pairs: list[StepPair], share: str, window: int | None) -> None:
    for impl in ("cpu", "reference"):
        _close(_plan(pairs, share), (2, 1), window, impl)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(step_pairs(), st.sampled_from(["tree", "pair", "none"]), st.one_of(st.none(), st.integers(1, 9)))
def test_the_mask_is_the_relation_of_descent(pairs: list[StepPair], share: str, window: int | None) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    ancestors: dict[int, list[int]] = {}
    cuts = batch.plan.cu_k.tolist()
    for start, stop in pairwise(cuts):
        path = batch.plan.keys.index[start:stop].tolist()
        ancestors |= {token: path[: i + 1] for i, token in enumerate(path)}
    expected = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for token, seen in ancestors.items():
        expected[token, seen if window is None else seen[-window:]] = True
    assert torch.equal(dense_mask(batch.plan, window), expected)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("size", [8, 64, 7])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, False), *OPTIONS.values(), (0.2, False)], ids=["plain", *OPTIONS, "low"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["forest", "star", "one leaf"])
def test_as_good_as_eager(
    plan: str, dtype: torch.dtype, softcap: float | None, sinks: bool, size: int, window: int | None
) -> None:
    tree = PLANS[plan]
    inputs = _with_sinks(_qkv(tree, size=size, dtype=dtype), sinks)
    upstream, scale = torch.randn_like(inputs[0]), size**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "sinks": s}
        return tree_attention(q, k, v, tree, scale=scale, impl="cpu", **options)

    def plain(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return _branch_by_branch(q, k, v, tree, scale, window, softcap, s)

    ours = value_and_gradients(attend, inputs, upstream)
    eager, oracle = (value_and_gradients(plain, inputs, upstream, as_dtype) for as_dtype in (None, torch.float64))
    for name, a, b, c in zip(["output", "dQ", "dK", "dV", "d sinks"], ours, eager, oracle, strict=False):
        assert a.dtype == dtype
        assert_as_good_as_eager(name, a, b, c, dtype)


def test_gradients_of_a_shared_prefix_are_summed_in_float32() -> None:
    # 400 leaves pull the root's value the same way: a bfloat16 sum would stand still.
    plan = _star(400, root=1, tail=1)
    query, key, value = (torch.zeros(plan.num_tokens, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    upstream = torch.full_like(query, 0.3)
    ours = value_and_gradients(
        lambda q, k, v: tree_attention(q, k, v, plan, scale=1.0, impl="cpu"), [query, key, value], upstream
    )
    # equal scores: the root has all of its own attention and half of each leaf's
    expected = (1 + 400 / 2) * upstream[0, 0, 0].double()
    torch.testing.assert_close(ours[3][0].double(), expected.expand(1, 8), rtol=2**-8, atol=0)


def test_scores_far_apart() -> None:
    plan = PLANS["forest"]
    qkv = [30 * x for x in _qkv(plan, dtype=torch.float32)]
    upstream = torch.randn_like(qkv[0])
    ours = value_and_gradients(lambda q, k, v: tree_attention(q, k, v, plan, scale=1.0, impl="cpu"), qkv, upstream)
    eager, oracle = (
        value_and_gradients(lambda q, k, v: _branch_by_branch(q, k, v, plan, 1.0), qkv, upstream, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name, a, b, c in zip(["output", "dQ", "dK", "dV"], ours, eager, oracle, strict=True):
        assert_as_good_as_eager(name, a, b, c, torch.float32)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 0.6])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_by_finite_differences(impl: str, window: int | None, softcap: float | None) -> None:
    plan = _plan([make_pair([1, 2], [3, 4], [5, 6]), make_pair([1, 2, 3], [7, 8], [9])])
    inputs = [x.requires_grad_() for x in _with_sinks(_qkv(plan, (2, 1), 3), True)]

    def attend(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        options: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "sinks": s}
        return tree_attention(q, k, v, plan, scale=0.7, impl=impl, **options)

    assert torch.autograd.gradcheck(attend, inputs)


def test_sinks_that_take_nothing_and_everything() -> None:
    plan = PLANS["forest"]
    qkv = _qkv(plan)
    plain = tree_attention(*qkv, plan, scale=0.3, impl="cpu")
    sinks = torch.tensor([-torch.inf, 0, 1000, -1000], dtype=torch.float64, requires_grad=True)
    output = tree_attention(*qkv, plan, scale=0.3, sinks=sinks, impl="cpu")
    torch.testing.assert_close(output[:, [0, 3]], plain[:, [0, 3]])
    assert not output[:, 2].any()
    (grad,) = torch.autograd.grad(output.square().sum(), sinks)
    assert grad.isfinite().all()
    assert (grad != 0).tolist() == [False, True, False, False]


def test_only_ancestors_get_a_gradient() -> None:
    plan = PLANS["forest"]
    mask = dense_mask(plan)
    query, key, value = _qkv(plan)
    for token in (0, 7, plan.num_tokens - 1):
        for x in (key, value):
            x.requires_grad_().grad = None
        tree_attention(query, key, value, plan, scale=0.5, impl="cpu")[token].sum().backward()
        for x in (key, value):
            assert x.grad is not None
            touched = x.grad.abs().sum(dim=(1, 2)) > 0
            # nothing outside, whatever the rounding; the key of a root sees no difference in its own softmax
            assert not touched[~mask[token]].any()
        assert value.grad is not None
        assert torch.equal(value.grad.abs().sum(dim=(1, 2)) > 0, mask[token])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_inputs_and_gradient_need_not_be_contiguous(impl: str) -> None:
    plan = PLANS["forest"]
    plain = [x.requires_grad_() for x in _qkv(plan)]
    upstream = torch.randn_like(plain[0])
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # heads before tokens, as transformers has them
        lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]],  # a slice of a fused projection
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),  # the elements of a head far apart
    ]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for grad in (*(layout(upstream) for layout in layouts), one.expand_as(upstream)):
        oracle = _branch_by_branch(*plain, plan, 0.3)
        expected = torch.autograd.grad(oracle, plain, grad)
        for which, layout in product(range(3), layouts):
            leaves = [layout(x.detach()) if i == which else x.detach().clone() for i, x in enumerate(plain)]
            assert not leaves[which].is_contiguous()
            output = tree_attention(*(x.requires_grad_() for x in leaves), plan, scale=0.3, impl=impl)
            torch.testing.assert_close(output, oracle)
            for a, b in zip(torch.autograd.grad(output, leaves, grad), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)  # _one_thread puts it back
    plan = PLANS["forest"]
    qkv, upstream = _qkv(plan, dtype=dtype), torch.randn(plan.num_tokens, 4, 8).to(dtype)

    def run() -> list[Tensor]:
        return value_and_gradients(lambda q, k, v: tree_attention(q, k, v, plan, scale=0.4), qkv, upstream)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_plan_first_used_in_inference_mode_can_be_trained_on(impl: str) -> None:
    results = []
    for first in (torch.inference_mode, torch.no_grad):
        plan = _plan(forest_pairs())  # whose blocks nobody has made
        qkv = _qkv(plan)
        with first():
            tree_attention(*qkv, plan, scale=0.4, impl=impl)
        upstream = torch.ones(plan.num_tokens, 4, 8, dtype=qkv[0].dtype)
        results.append(
            value_and_gradients(
                lambda q, k, v, plan=plan: tree_attention(q, k, v, plan, scale=0.4, impl=impl), qkv, upstream
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_casts() -> None:
    plan = PLANS["forest"]
    qkv = [x.float().requires_grad_() for x in _qkv(plan)]
    with torch.autocast("cpu", torch.bfloat16):
        output = tree_attention(*qkv, plan, scale=0.3, impl="cpu")
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, tree_attention(*(x.bfloat16() for x in qkv), plan, scale=0.3, impl="cpu"))
    assert {g.dtype for g in torch.autograd.grad(output.float().sum(), qkv)} == {torch.float32}


def test_sinks_of_another_dtype() -> None:
    plan = PLANS["forest"]
    qkv = _qkv(plan, dtype=torch.bfloat16)
    sinks = torch.tensor([0.3, -1.1, 2.3, 0.7], requires_grad=True)
    output = tree_attention(*qkv, plan, scale=0.3, sinks=sinks, impl="cpu")
    assert output.dtype == torch.bfloat16
    exact = tree_attention(*(x.double() for x in qkv), plan, scale=0.3, sinks=sinks.double(), impl="reference")
    upstream = torch.randn_like(output)
    torch.testing.assert_close(output.double(), exact, rtol=2**-7, atol=2**-8)
    (ours,), (theirs,) = (torch.autograd.grad(x, sinks, upstream.to(x.dtype)) for x in (output, exact))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_values_of_another_size(impl: str) -> None:
    plan = PLANS["forest"]
    query, key, _ = _qkv(plan, (4, 2), 8)
    value = torch.randn(plan.num_tokens, 2, 5, dtype=torch.float64)
    upstream = torch.randn(plan.num_tokens, 4, 5, dtype=torch.float64)
    ours = value_and_gradients(
        lambda q, k, v: tree_attention(q, k, v, plan, scale=0.3, impl=impl), [query, key, value], upstream
    )
    oracle = value_and_gradients(lambda q, k, v: _branch_by_branch(q, k, v, plan, 0.3), [query, key, value], upstream)
    for x, y in zip(ours, oracle, strict=True):
        torch.testing.assert_close(x, y)


def test_auto_takes_the_cpu_path_on_the_cpu() -> None:
    plan = PLANS["one leaf"]
    inputs = dict(zip(("query", "key", "value"), _qkv(plan), strict=True))
    assert _dispatch.choose("tree_attention", "auto", inputs).run is cpu.tree_attention
    integers = [x.to(torch.int64) for x in _qkv(plan, (2, 2))]
    with pytest.raises(ValueError, match=r"it takes no torch\.int64"):
        tree_attention(*integers, plan, scale=1.0, impl="cpu")
    inputs = dict(zip(("query", "key", "value"), integers, strict=True))
    assert _dispatch.choose("tree_attention", "auto", inputs).name == "reference"  # which can


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(5, 4, 8), (4, 2, 8), (4, 2, 8)], {}, "the plan is for 4 tokens, got 5 queries, 4 keys"),
        ([(4, 4, 8), (4, 2, 8), (3, 2, 8)], {}, "the plan is for 4 tokens"),
        ([(3, 4, 8), (3, 2, 8), (3, 2, 8)], {}, "the plan is for 4 tokens, got 3 queries, 3 keys"),
        ([(4, 4, 8), (4, 3, 8), (4, 3, 8)], {}, r"heads do not fit: \(4, 4, 8\), \(4, 3, 8\), \(4, 3, 8\)"),
        ([(4, 4, 8), (4, 2, 9), (4, 2, 8)], {}, "heads do not fit"),
        ([(4, 4, 8), (4, 2, 8), (4, 4, 8)], {}, "heads do not fit"),
        ([(1, 4, 4, 8), (4, 2, 8), (4, 2, 8)], {}, r"must be \(T, heads, d\), got 4, 3, 3 dims"),
        ([(4, 4, 8), (4, 2, 8), (4, 2, 8)], {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ([(4, 4, 8), (4, 2, 8), (4, 2, 8)], {"impl": "chunked"}, "no implementation 'chunked' of operation"),
    ],
)
def test_bad_input(shapes: list[tuple[int, ...]], options: dict[str, Any], message: str) -> None:
    plan = PLANS["one leaf"]
    assert plan.num_tokens == 4
    query, key, value = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        tree_attention(query, key, value, plan, scale=1.0, **options)


def test_a_plan_of_one_leaf_by_hand() -> None:
    index = np.arange(3)
    plan = TreePlan(
        keys=Ragged.from_rows(index, np.ones_like(index), 3),
        cu_q=torch.tensor([0, 3], dtype=torch.int32),
        cu_k=torch.tensor([0, 3], dtype=torch.int32),
        max_q=3,
        max_k=3,
    )
    value = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    zero = torch.zeros(3, 1, 1)
    for impl in ("cpu", "reference"):
        means = tree_attention(zero, zero, value, plan, scale=1.0, impl=impl).flatten()
        torch.testing.assert_close(means, torch.tensor([1, 1.5, 7 / 3]))
        pairs = tree_attention(zero, zero, value, plan, scale=1.0, sliding_window=2, impl=impl).flatten()
        torch.testing.assert_close(pairs, torch.tensor([1, 1.5, 3]))
