"""Tree attention in Triton, in the interpreter on small forests: against the definition, and what torch asks of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.tree_attention import selftest, tree_attention
from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.ops.tree_attention.triton_tiles import Shape, intervals, make_tiles
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import Ragged, StepPair, TreePlan
from tests.attention import described, no_tokens, plan_of, random_inputs, star
from tests.forests import forest_pairs, make_pair, nested_pairs, step_pairs
from tests.numerics import assert_as_good_as_eager, value_and_gradients

pytest.importorskip("triton")
from stepdpo_kernels.ops.tree_attention import triton_kernel

pytestmark = pytest.mark.skipif(not triton_kernel.INTERPRETED, reason="for Triton's interpreter")

NAMES = ["output", "dQ", "dK", "dV", "d sinks"]


PLANS = {
    "forest": plan_of(forest_pairs()),
    "nested": plan_of(nested_pairs()),
    "pairs": plan_of(nested_pairs()[:3], "pair"),
    "one leaf": plan_of([make_pair([1, 2, 3], [4, 5], [4, 5])]),
    "one token": plan_of([make_pair([1], [2], [3])]),
}


_inputs = partial(random_inputs, dtype=torch.float32)  # query, key, value and sinks, if any


def _upstream(inputs: list[Tensor]) -> Tensor:
    return torch.randn(*inputs[0].shape[:2], inputs[2].shape[2]).to(inputs[0].dtype)


def _attention(plan: TreePlan, impl: str = "triton", scale: float = 0.4, **options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, sinks=None: tree_attention(q, k, v, plan, scale=scale, sinks=sinks, impl=impl, **options)


def _eager(
    plan: TreePlan, scale: float = 0.4, sliding_window: int | None = None, softcap: float | None = None
) -> Callable[..., Tensor]:
    """What people write: a mask, scores in the dtype of the inputs, a softmax in at least float32."""
    barred = ~dense_mask(plan, sliding_window)

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        group, tokens = query.shape[1] // key.shape[1], query.shape[0]
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
        scores = query.transpose(0, 1) @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(barred, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, tokens, 1)], dim=2)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        return (weights[:, :, :tokens] @ v).transpose(0, 1)

    return attend


def _close(plan: TreePlan, inputs: list[Tensor], **options: Any) -> None:
    """For forests in which tokens see little but themselves: a gradient of zero is the difference of equal numbers."""
    upstream = _upstream(inputs)
    ours = value_and_gradients(_attention(plan, **options), inputs, upstream)
    oracle = value_and_gradients(_eager(plan, **options), inputs, upstream, torch.float64)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def _check(plan: TreePlan, inputs: list[Tensor], **options: Any) -> None:
    upstream, dtype = _upstream(inputs), inputs[0].dtype
    ours = value_and_gradients(_attention(plan, **options), inputs, upstream)
    eager, oracle = (
        value_and_gradients(_eager(plan, **options), inputs, upstream, as_dtype) for as_dtype in (None, torch.float64)
    )
    for name, a, b, c in zip(NAMES, ours, eager, oracle, strict=False):
        assert a.dtype == dtype
        assert_as_good_as_eager(name, a, b, c, dtype)


CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "seven heads a key, window": {"heads": (7, 1), "sizes": (16, 16), "sliding_window": 6},
    "multi-query, odd sizes, all": {
        "heads": (3, 1), "sizes": (7, 20), "sinks": True, "softcap": 1.5, "sliding_window": 5,
    },
    "multi-head, two sizes, sinks": {"heads": (2, 2), "sizes": (24, 16), "sinks": True},
    "softcap far above": {"heads": (2, 1), "softcap": 50.0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_eager(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    shapes = {name: options.pop(name) for name in ("heads", "sizes", "sinks") if name in options}
    plan = PLANS["forest"]
    _check(plan, _inputs(plan, **shapes, dtype=dtype), **options)


@pytest.mark.parametrize("window", [None, 1, 2, 17, 1000])
@pytest.mark.parametrize("plan", [name for name in PLANS if name != "forest"])
def test_windows(plan: str, window: int | None) -> None:
    _close(PLANS[plan], _inputs(PLANS[plan], (2, 1)), sliding_window=window)


@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_windows_beyond_int32(window: int) -> None:
    plan = PLANS["pairs"]
    inputs = _inputs(plan, (2, 1))
    upstream = _upstream(inputs)
    windowed, plain = (
        value_and_gradients(_attention(plan, sliding_window=w), inputs, upstream) for w in (window, None)
    )
    assert all(torch.equal(a, b) for a, b in zip(windowed, plain, strict=True))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(step_pairs(), st.sampled_from(["tree", "pair", "none"]), st.one_of(st.none(), st.integers(1, 9)))
def test_any_forest(pairs: list[StepPair], share: str, window: int | None) -> None:
    plan = plan_of(pairs, share)
    _close(plan, _inputs(plan, (2, 1)), sliding_window=window)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 0.3])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sizes", [(16, 16), (80, 80), (96, 64), (40, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_option(
    dtype: torch.dtype, sizes: tuple[int, int], window: int | None, sinks: bool, softcap: float | None
) -> None:
    plan = PLANS["nested"]
    _check(plan, _inputs(plan, (6, 2), sizes, sinks=sinks, dtype=dtype), sliding_window=window, softcap=softcap)


# ---- which tiles are visited ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(step_pairs(), st.sampled_from(["tree", "pair", "none"]), st.one_of(st.none(), st.integers(1, 9)))
def test_ends_and_depths_are_the_mask(pairs: list[StepPair], share: str, window: int | None) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    ends, depths = intervals(batch.plan)
    assert torch.equal(depths, batch.position_ids)
    t, s = torch.arange(batch.num_tokens)[:, None], torch.arange(batch.num_tokens)
    sees = (s <= t) & (t < ends)
    if window is not None:
        sees &= depths[:, None] - depths < window
    assert torch.equal(sees, dense_mask(batch.plan, window))


def _listed(lists: Tensor) -> list[set[int]]:
    found = [row[1 : 1 + row[0]] for row in lists.tolist()]
    assert all(row == sorted(set(row)) for row in found)
    return [set(row) for row in found]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    step_pairs(),
    st.sampled_from(["tree", "none"]),
    st.one_of(st.none(), st.integers(1, 9)),
    st.sampled_from([1, 2, 3, 7]),
    st.tuples(st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 8])),
)
def test_tiles_that_nobody_sees_are_left_out(
    pairs: list[StepPair], share: str, window: int | None, group: int, shape: tuple[int, int]
) -> None:
    plan = plan_of(pairs, share)
    tiles = make_tiles(plan, window, group, Shape(4, 4), Shape(*shape), Shape(*shape))
    rows = dense_mask(plan, window).repeat_interleave(group, dim=0)  # (T * group, T)
    exact = [{int(s) // shape[1] for s in block.any(dim=0).nonzero()} for block in rows.split(shape[0])]
    visited = _listed(tiles.d_query)
    if window is None or shape == (1, 1):
        assert visited == exact
    everything = _listed(make_tiles(plan, None, group, *[Shape(*shape)] * 3).d_query)
    assert all(few <= some <= many for few, some, many in zip(exact, visited, everything, strict=True))
    by_tile = [{b for b, some in enumerate(visited) if tile in some} for tile in range(tiles.d_key.shape[0])]
    assert _listed(tiles.d_key) == by_tile
    assert _listed(tiles.forward) == _listed(make_tiles(plan, window, group, *[Shape(4, 4)] * 3).d_query)


def test_a_window_leaves_out_tiles() -> None:
    plan = plan_of([make_pair([1] * 64, [2], [3])])
    tiles = make_tiles(plan, 8, 1, *[Shape(8, 8)] * 3)
    assert tiles.forward[:, 0].tolist() == [1] + [2] * 7


def test_tiles_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, searchsorted = plan_of(nested_pairs()), Mock(wraps=torch.searchsorted)
    monkeypatch.setattr(torch, "searchsorted", searchsorted)
    inputs = [x.requires_grad_() for x in _inputs(plan, (2, 1))]
    first, second = (_attention(plan)(*inputs) for _ in range(2))
    torch.autograd.grad(first.sum() + second.sum(), inputs)
    assert searchsorted.call_count == 3


def test_a_plan_first_used_in_inference_mode_can_be_trained_on() -> None:
    pairs = [make_pair([1, 2, 3], [4, 5], [6])]
    inputs = _inputs(plan_of(pairs))
    upstream, results = _upstream(inputs), []
    for first in (torch.inference_mode, torch.no_grad):
        plan = plan_of(pairs)  # whose tiles nobody has made
        with first():
            _attention(plan)(*inputs)
        results.append(value_and_gradients(_attention(plan), inputs, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_plan_out_of_order_fails() -> None:
    # the second leaf's path goes through a token that the first one's does not
    index = np.array([0, 1, 2, 0, 2, 3])
    plan = TreePlan(
        keys=Ragged.from_rows(index, np.ones_like(index), 4),
        cu_q=torch.tensor([0, 3, 4], dtype=torch.int32),
        cu_k=torch.tensor([0, 3, 6], dtype=torch.int32),
        max_q=3,
        max_k=3,
    )
    with pytest.raises(RuntimeError, match="not those of a forest in depth-first order"):
        _attention(plan)(*_inputs(plan))


# ---- edges ----------------------------------------------------------------------------------------------------------


def test_no_tokens() -> None:
    plan = no_tokens()
    inputs = [x.requires_grad_() for x in _inputs(plan, sinks=True)]
    output = _attention(plan, sliding_window=3)(*inputs)
    assert output.shape == (0, 4, 8)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    assert not gradients[3].any()


def test_scores_far_apart() -> None:
    plan = PLANS["nested"]
    inputs = [30 * x for x in _inputs(plan, sinks=True)]
    upstream = _upstream(inputs)
    ours = value_and_gradients(_attention(plan, scale=1.0), inputs, upstream)
    oracle = value_and_gradients(_eager(plan, 1.0), inputs, upstream, torch.float64)
    # backward computes the scores anew, from transposed tiles: they may be rounded another way
    largest = max(torch.einsum("thd,shd->hts", inputs[0][:, i::2], inputs[1]).abs().max().item() for i in range(2))
    assert largest > 5000
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * largest * 2**-23 * b.abs().max().item() + 1e-30)


def test_sinks_that_take_all_or_nothing() -> None:
    plan = PLANS["nested"]
    query, key, value = _inputs(plan, (4, 2))
    sinks = torch.tensor([-torch.inf, 1e4, 0.0, -1e4])
    plain = _attention(plan)(query, key, value)
    output = _attention(plan)(query, key, value, sinks)
    assert torch.equal(output[:, [0, 3]], plain[:, [0, 3]])
    assert not output[:, 1].any()


def test_gradients_of_a_shared_prefix_are_summed_in_float32() -> None:
    # 400 leaves pull the root's value the same way: a bfloat16 sum would stand still.
    plan = star(400, root=1, tail=1)
    zeros = [torch.zeros(plan.num_tokens, 1, 8, dtype=torch.bfloat16) for _ in range(3)]
    upstream = torch.full_like(zeros[0], 0.3)
    d_value = value_and_gradients(_attention(plan), zeros, upstream)[3]
    # equal scores: the root has all of its own attention and half of each leaf's
    expected = (1 + 400 / 2) * upstream[0, 0, 0].double()
    torch.testing.assert_close(d_value[0].double(), expected.expand(1, 8), rtol=2**-8, atol=0)


def test_only_ancestors_get_a_gradient() -> None:
    plan = PLANS["nested"]
    mask = dense_mask(plan)
    for token in (0, 7, plan.num_tokens - 1):
        query, key, value = (x.requires_grad_() for x in _inputs(plan, (2, 1)))
        d_key, d_value = torch.autograd.grad(_attention(plan)(query, key, value)[token].sum(), (key, value))
        assert not d_key[~mask[token]].any()
        assert torch.equal(d_value.abs().sum(dim=(1, 2)) > 0, mask[token])


def test_a_nan_is_seen() -> None:
    plan = PLANS["nested"]
    query, key, value = _inputs(plan)
    query[3, 1, 5] = torch.nan
    output = _attention(plan)(query, key, value)
    assert output.isnan().any(dim=2).nonzero().tolist() == [[3, 1]]


def test_inputs_and_gradient_need_not_be_contiguous() -> None:
    plan = PLANS["one leaf"]
    plain = [x.requires_grad_() for x in _inputs(plan, sizes=(16, 16))]
    upstream = _upstream(plain)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # heads before tokens, as transformers has them
        lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]],  # a slice of a fused projection
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),  # the elements of a head far apart
        lambda x: torch.cat([x, x], dim=2)[..., 1 : x.shape[2] + 1].copy_(x),  # heads that begin at odd numbers
    ]
    for grad in (*(layout(upstream) for layout in layouts), torch.ones(1, 1, 1).expand_as(upstream)):
        expected = torch.autograd.grad(_attention(plan)(*plain), plain, grad)
        for layout in layouts:
            leaves = [layout(x.detach()).requires_grad_() for x in plain]
            assert not any(x.is_contiguous() for x in leaves)
            gradients = torch.autograd.grad(_attention(plan)(*leaves), leaves, grad)
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_heads_too_far_apart_for_int32_are_brought_together() -> None:
    for heads, copied in ((64, False), (65, True)):
        x = torch.empty_strided((4, heads, 16), (16, 2**25, 1), device="meta")
        assert triton_kernel._aligned(x).is_contiguous() == copied


def test_heads_that_need_no_padding_are_kept_as_they_are() -> None:
    plan = PLANS["nested"]
    for sizes, kept in (((16, 16), [True, True, True]), ((16, 8), [True, True, False])):
        inputs = [x.requires_grad_() for x in _inputs(plan, sizes=sizes)]
        saved: set[int] = set()

        def keep(x: Tensor, saved: set[int] = saved) -> Tensor:
            saved.add(x.data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _attention(plan)(*inputs)
        assert [x.data_ptr() in saved for x in inputs] == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time_and_inputs_untouched(dtype: torch.dtype) -> None:
    plan = PLANS["nested"]
    inputs = _inputs(plan, sinks=True, dtype=dtype)
    before, upstream = [x.clone() for x in inputs], _upstream(inputs)
    first, again = (value_and_gradients(_attention(plan, softcap=2.0), inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    with torch.no_grad():  # as the reference model is run
        assert torch.equal(_attention(plan, softcap=2.0)(*inputs), first[0])


@pytest.mark.parametrize("learning", [(0,), (1, 2), (3,)], ids=str)
def test_what_is_frozen_gets_no_gradient(learning: tuple[int, ...]) -> None:
    plan = PLANS["one leaf"]
    inputs = _inputs(plan, sinks=True)
    upstream = _upstream(inputs)
    full = value_and_gradients(_attention(plan), inputs, upstream)[1:]
    for i in learning:
        inputs[i].requires_grad_()
    _attention(plan)(*inputs).backward(upstream)
    for i, x in enumerate(inputs):
        assert torch.equal(x.grad, full[i]) if i in learning else x.grad is None


# ---- what torch asks of it ------------------------------------------------------------------------------------------


def test_gradients_of_gradients_are_refused_not_wrong() -> None:
    plan = PLANS["one leaf"]
    inputs = [x.requires_grad_() for x in _inputs(plan)]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(_attention(plan)(*inputs).sum(), inputs, create_graph=True)


def test_autocast() -> None:
    plan = PLANS["one leaf"]
    inputs = [x.requires_grad_() for x in _inputs(plan)]
    with torch.autocast("cpu", torch.bfloat16):
        output = _attention(plan)(*inputs)
        gradients = torch.autograd.grad(output.float().sum(), inputs)
    assert torch.equal(output, _attention(plan)(*(x.bfloat16() for x in inputs)))
    assert {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck(sinks: bool) -> None:
    plan = PLANS["one leaf"]
    query, key, value, *rest = (x.requires_grad_() for x in _inputs(plan, sizes=(16, 32), sinks=sinks))
    tiles = make_tiles(plan, 3, 2, *triton_kernel.INTERPRETER_CONFIG.shapes)
    arguments = (query, key, value, rest[0] if sinks else None, *tiles, 0.5, 3, 2.0)
    torch.library.opcheck(triton_kernel._attention, arguments)


def test_compiles_without_a_graph_break() -> None:
    plan = PLANS["one leaf"]

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        output = triton_kernel.tree_attention(torch.tanh(q), k, v, plan, scale=0.5, sliding_window=2, sinks=sinks)
        return (output * 2).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.requires_grad_() for x in _inputs(plan, sinks=True)]
        loss = function(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- what it takes --------------------------------------------------------------------------------------------------


def test_why_not() -> None:
    plan = PLANS["one leaf"]
    arguments = dict(zip(("query", "key", "value"), _inputs(plan, sizes=(256, 7)), strict=True))
    assert triton_kernel.why_not(arguments) == []
    wide = dict(zip(("query", "key", "value"), _inputs(plan, sizes=(8, 257), dtype=torch.float64), strict=True))
    assert triton_kernel.why_not(wide) == [
        "it takes float32, bfloat16 and float16, and query is torch.float64",
        "heads of at most 256, not 257",
    ]


def test_auto_takes_it_where_flash_attention_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: set[str] = set()
    monkeypatch.setattr(selftest, "fault", lambda name, *_: f"{name} is broken" if name in broken else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def taken(dtype: torch.dtype = torch.bfloat16) -> str:
        return _dispatch.choose("tree_attention", "auto", described(dtype=dtype)).name

    assert taken() in ("flash", "varlen")
    assert taken(torch.float32) == "triton"
    broken |= {"flash", "varlen"}
    assert taken() == "triton"
    broken.add("triton")
    assert taken() == "flex"


def test_the_interpreter_is_asked_for_by_name() -> None:
    plan = PLANS["one leaf"]
    inputs = {**dict(zip(("query", "key", "value"), _inputs(plan), strict=True)), "plan": plan}
    assert _dispatch.choose("tree_attention", "auto", inputs).name == "cpu"
    assert _dispatch.choose("tree_attention", "triton", inputs).name == "triton"


@pytest.mark.parametrize("target", sorted({key[:2] for key in triton_kernel.CONFIGS}), ids=str)
def test_every_head_has_tiles(monkeypatch: pytest.MonkeyPatch, target: tuple[str, int]) -> None:
    monkeypatch.setattr(triton_kernel, "target_of", lambda device: target)
    for dtype, size in product(triton_kernel.DTYPES, range(1, triton_kernel.MAX_SIZE + 1)):
        assert triton_kernel.config_for(torch.device("cuda"), dtype, size)
