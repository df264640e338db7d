"""The blocks of the CPU's tree attention: what they hold, and results wherever their boundaries fall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.tree_attention import blocks, cpu, tree_attention
from stepdpo_kernels.ops.tree_attention.blocks import Blocks, blocks_of, is_depth_first
from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import Ragged, StepPair, TreePlan
from tests.allocations import Allocations
from tests.forests import forest_pairs, make_pair, step_pairs
from tests.numerics import assert_as_good_as_eager, value_and_gradients

_LIMITS = ("CHUNK_PAIRS", "SEGMENT_KEYS", "KEPT_PAIRS", "STRIDE", "MAX_ROWS", "KEY_COST", "CHUNK_COST")


@pytest.fixture(autouse=True)
def _no_blocks_of_other_limits() -> Iterator[None]:
    blocks_of.cache_clear()
    yield
    blocks_of.cache_clear()


def _plan(pairs: Sequence[StepPair], share: str = "tree") -> TreePlan:
    return build_batch(pairs, range(len(pairs)), share).plan


def _chains(*lengths: int) -> TreePlan:
    """A tree of one leaf for each length."""
    return _plan([make_pair([i + 1] * n, [9], [9]) for i, n in enumerate(lengths)])


def _comb(stem: int, teeth: int, tooth: int) -> TreePlan:
    """A stem of tokens from which equally long branches leave at equal distances."""
    step = stem // teeth
    pairs = [make_pair([1] * (step * (i + 1)), [2 + i] * (tooth + 1), [1, 1]) for i in range(teeth)]
    return _plan(pairs)


def _qkv(plan: TreePlan, heads: tuple[int, int] = (4, 2), size: int = 8) -> list[Tensor]:
    torch.manual_seed(plan.num_tokens)
    return [torch.randn(plan.num_tokens, h, size, dtype=torch.float64) for h in (heads[0], heads[1], heads[1])]


def _close(
    plan: TreePlan, window: int | None = None, heads: tuple[int, int] = (4, 2), softcap: float | None = None
) -> None:
    """With a softcap also with sinks."""
    qkv = _qkv(plan, heads)
    upstream = torch.randn_like(qkv[0])
    inputs = qkv if softcap is None else [*qkv, torch.randn(heads[0], dtype=torch.float64)]

    def attend(impl: str, q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "sinks": s}
        return tree_attention(q, k, v, plan, scale=0.3, impl=impl, **options)

    ours, oracle = (value_and_gradients(partial(attend, impl), inputs, upstream) for impl in ("cpu", "reference"))
    for name, a, b in zip(["output", "dQ", "dK", "dV", "d sinks"], ours, oracle, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def _check(plan: TreePlan, window: int | None, groups: int) -> Blocks:
    """That the blocks hold every query once and, for each, exactly the keys that it sees."""
    of_plan = blocks_of(plan, window, groups)
    seen = torch.zeros(plan.num_tokens, plan.num_tokens, groups, dtype=torch.int64)
    slots = torch.full((plan.num_tokens * groups,), -1)
    used = 0
    for chunk in of_plan.chunks:
        count, n, m = chunk.shape
        key_rows, mask = chunk.keys()
        assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
        assert (mask == 0).any(dim=2).all()  # a query that saw nothing would divide by zero
        real = torch.ones(count * groups * n, dtype=torch.bool).index_fill_(0, chunk.padding, 0)
        queries = chunk.query_rows.view(count, groups, n)
        keys = key_rows.view(count, groups, m)
        for block in range(count):
            for group in range(groups):
                rows = real.view(count, groups, n)[block, group]
                q, k = queries[block, group][rows], keys[block, group]
                assert (q % groups == group).all()
                assert (k % groups == group).all()
                at = q[:, None] // groups, k[None] // groups
                seen[:, :, group].index_put_(at, (mask[block][rows] == 0).long(), accumulate=True)
        slots[chunk.query_rows[real]] = used + real.nonzero()[:, 0]
        used += real.numel()
        assert count * n * m <= blocks.CHUNK_PAIRS or count == n == 1
        assert n <= blocks.MAX_ROWS
    assert torch.equal(seen, dense_mask(plan, window)[:, :, None].expand_as(seen).long())
    assert torch.equal(slots, of_plan.query_slots)
    return of_plan


_LIMIT_VALUES = st.fixed_dictionaries(
    {
        "CHUNK_PAIRS": st.sampled_from([1, 9, 40, 200, 1 << 17]),
        "SEGMENT_KEYS": st.sampled_from([0, 1, 4]),
        "KEPT_PAIRS": st.sampled_from([0, 1 << 23]),
        "STRIDE": st.sampled_from([1, 3, 64]),
        "MAX_ROWS": st.sampled_from([1, 2, 7, 256]),
        "KEY_COST": st.sampled_from([0, 32]),
        "CHUNK_COST": st.sampled_from([0, 50, 3000]),
    }
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    step_pairs(),
    st.sampled_from(["tree", "pair", "none"]),
    st.one_of(st.none(), st.integers(1, 9)),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 0.7]),
    _LIMIT_VALUES,
)
def test_any_forest_under_any_limits(
    pairs: list[StepPair],
    share: str,
    window: int | None,
    groups: int,
    softcap: float | None,
    limits: dict[str, int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(blocks, name, value)
        # a stride beyond the rows of a block leaves it no choice but a longer one
        patch.setattr(blocks, "STRIDE", min(limits["STRIDE"], limits["MAX_ROWS"]))
        plan = _plan(pairs, share)
        of_plan = _check(plan, window, groups)
        assert all(
            sum(c.columns for c in s.chunks[:-1]) <= blocks.SEGMENT_KEYS * plan.num_tokens for s in of_plan.segments
        )
        _close(plan, window, (2, groups), softcap)


SIZES = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 320, 513]


@pytest.mark.parametrize("window", [None, 1, 64, 200])
@pytest.mark.parametrize("size", SIZES)
def test_trees_about_the_size_of_a_block(size: int, window: int | None) -> None:
    plan = _chains(size)
    assert plan.num_tokens == size
    _check(plan, window, 1)
    _close(plan, window, (2, 1))


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("sizes", [(256, 1), (1, 256), (255, 257), (64, 64, 64), (1, 1, 1), (40, 300, 7)])
def test_several_trees(sizes: tuple[int, ...], window: int | None) -> None:
    plan = _chains(*sizes)
    _check(plan, window, 1)
    _close(plan, window, (2, 1))


@pytest.mark.parametrize("window", [None, 5, 90])
@pytest.mark.parametrize(("stem", "teeth", "tooth"), [(300, 6, 40), (64, 64, 3), (200, 2, 256)])
def test_combs(stem: int, teeth: int, tooth: int, window: int | None) -> None:
    plan = _comb(stem, teeth, tooth)
    assert plan.num_leaves >= teeth
    _check(plan, window, 1)
    _close(plan, window, (2, 1))


def _rewired(plan: TreePlan, paths: list[list[int]], cu_q: list[int] | None = None) -> TreePlan:
    index, lengths = np.concatenate(paths), np.array([len(path) for path in paths])
    return TreePlan(
        keys=Ragged.from_rows(index, np.ones_like(index), plan.num_tokens),
        cu_q=plan.cu_q if cu_q is None else torch.tensor(cu_q, dtype=torch.int32),
        cu_k=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_q=plan.max_q,
        max_k=int(lengths.max()),
    )


def test_paths_of_no_forest_are_left_to_the_definition() -> None:
    plan = _plan([make_pair([1, 2, 3], [4, 5, 6, 7], [8, 9, 9])])  # 0 1 2 3 4 5 and 0 1 2 6 7
    qkv = _qkv(plan)
    paths = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7]]
    assert is_depth_first(plan)
    assert is_depth_first(_rewired(plan, paths))
    others: list[tuple[list[list[int]], list[int] | None]] = [
        ([paths[0], [0, 1, 3, 6, 7]], None),  # a sibling
        ([paths[0], [5, 0, 1, 2, 6, 7]], None),  # one token more
        ([paths[0], [0, 2, 6, 7]], None),  # one less
        ([paths[0], [0, 1, 2, 7, 6]], None),  # in another order
        ([[1, 0, 2, 3, 4, 5], paths[1]], None),
        (paths, [0, 5, 8]),  # a token asked by another leaf
        ([paths[0][1:], paths[1]], None),  # fewer keys than queries
    ]
    for changed, cu_q in others:
        broken = _rewired(plan, changed, cu_q)
        assert not is_depth_first(broken)
        with pytest.raises(ValueError, match="the paths of the plan are not those of a forest in depth-first order"):
            tree_attention(*qkv, broken, scale=0.3, impl="cpu")
        inputs = {"query": qkv[0], "key": qkv[1], "value": qkv[2], "plan": broken}
        assert _dispatch.choose("tree_attention", "auto", inputs).name == "reference"


def test_no_tokens() -> None:
    nothing = np.empty(0, np.int64)
    zero = torch.zeros(1, dtype=torch.int32)
    plan = TreePlan(keys=Ragged.from_rows(nothing, nothing, 0), cu_q=zero, cu_k=zero, max_q=0, max_k=0)
    qkv = [torch.empty(0, h, 8, requires_grad=True) for h in (4, 2, 2)]
    inputs = [*qkv, torch.ones(4, requires_grad=True)]
    output = tree_attention(*qkv, plan, scale=1.0, sinks=inputs[3], impl="cpu")
    assert output.shape == (0, 4, 8)
    assert [g.shape for g in torch.autograd.grad(output.sum(), inputs)] == [x.shape for x in inputs]


def _saved(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, softcap: float | None = None) -> list[Tensor]:
    """What a forward keeps for backward."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tree_attention(query, key, value, plan, scale=0.3, softcap=softcap, impl="cpu")
    return saved


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probabilities_kept_or_not_are_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, softcap: float | None
) -> None:
    plan = _plan(forest_pairs())
    qkv = [x.to(dtype) for x in _qkv(plan)]
    upstream = torch.randn_like(qkv[0])
    results, saved = [], []
    for keep in (0, 1000):
        monkeypatch.setattr(cpu, "KEPT_PROBABILITIES", keep)
        results.append(
            value_and_gradients(
                lambda q, k, v: tree_attention(q, k, v, plan, scale=0.3, softcap=softcap, impl="cpu"), qkv, upstream
            )
        )
        saved.append(len(_saved(*(x.clone().requires_grad_() for x in qkv), plan, softcap)))
    assert saved == [3, 3 + (1 if softcap is None else 2) * len(blocks_of(plan, None, 2).chunks)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_what_is_kept_is_bounded_by_the_queries(softcap: float | None) -> None:
    for length in (60, 100, 1000):
        plan = _chains(length)
        query, key, value = (x.float().requires_grad_() for x in _qkv(plan, (4, 1), 32))
        probabilities = _saved(query, key, value, plan, softcap)[3:]
        assert bool(probabilities) == (length <= (100 if softcap is None else 60))
        assert sum(x.nbytes for x in probabilities) <= cpu.KEPT_PROBABILITIES * query.nbytes


def test_nothing_is_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK_PAIRS", 1 << 10)
    plan = _plan(forest_pairs())
    qkv = _qkv(plan)
    blocks_of(plan, None, 2)
    peaks = []
    for _ in range(2):
        with Allocations() as allocations:
            tree_attention(*qkv, plan, scale=0.3, impl="cpu")
        peaks.append(allocations.peak)
        qkv = [x.requires_grad_() for x in qkv]
    assert peaks[0] < 0.7 * peaks[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("product", [None, torch.float32], ids=str)
def test_processors_with_and_without_products_of_the_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, product: torch.dtype | None
) -> None:
    monkeypatch.setattr(cpu, "_product_dtype", lambda dtype: product or dtype)
    plan = _plan(forest_pairs())
    qkv = [x.to(dtype) for x in _qkv(plan)]
    upstream = torch.randn_like(qkv[0])

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            q.transpose(0, 1),
            k.repeat_interleave(2, 1).transpose(0, 1),
            v.repeat_interleave(2, 1).transpose(0, 1),
        )
        scores = (q @ k.mT * 0.3).masked_fill(~dense_mask(plan), -torch.inf)
        return (scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v).transpose(0, 1)

    ours = value_and_gradients(lambda q, k, v: tree_attention(q, k, v, plan, scale=0.3, impl="cpu"), qkv, upstream)
    theirs, oracle = (value_and_gradients(eager, qkv, upstream, as_dtype) for as_dtype in (None, torch.float64))
    for name, a, b, c in zip(["output", "dQ", "dK", "dV"], ours, theirs, oracle, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_eager(name, a, b, c, dtype)


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of_matrices = self.of_batches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of_matrices += func is torch.ops.aten.addmm_.default
        self.of_batches += func is torch.ops.aten.baddbmm_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", [3, 4])
def test_three_large_matrices_on_two_threads(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    monkeypatch.setattr(cpu, "LARGE_PRODUCT", 0)
    torch.set_num_threads(2)  # _one_thread puts it back
    plan = _chains(40)
    _close(plan, None, (2 * groups, groups))
    qkv = [x.float() for x in _qkv(plan, (2 * groups, groups))]
    with _Products() as products:
        tree_attention(*qkv, plan, scale=0.3, impl="cpu")
    assert (products.of_matrices, products.of_batches) == ((6, 0) if groups == 3 else (0, 2))


@pytest.mark.parametrize("segment_keys", [0, 4])
def test_blocks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch, segment_keys: int) -> None:
    # 400 leaves in 200 blocks pull the root's value the same way: a bfloat16 sum of the blocks would stand still
    monkeypatch.setattr(blocks, "MAX_ROWS", 2)
    monkeypatch.setattr(blocks, "CHUNK_PAIRS", 6)
    monkeypatch.setattr(blocks, "SEGMENT_KEYS", segment_keys)
    plan = _plan([make_pair([1], [10 + 2 * i] * 2, [11 + 2 * i] * 2) for i in range(200)])
    assert len(blocks_of(plan, None, 1).chunks) >= 200
    query, key, value = (torch.zeros(plan.num_tokens, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    upstream = torch.full_like(query, 0.3)
    ours = value_and_gradients(
        lambda q, k, v: tree_attention(q, k, v, plan, scale=1.0, impl="cpu"), [query, key, value], upstream
    )
    expected = (1 + 400 / 2) * upstream[0, 0, 0].double()  # all of its own attention and half of each leaf's
    torch.testing.assert_close(ours[3][0].double(), expected.expand(1, 8), rtol=2**-8, atol=0)


def test_memory_of_a_long_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK_PAIRS", 1 << 13)
    monkeypatch.setattr(blocks, "KEPT_PAIRS", 1 << 14)
    heads, size = 2, 4
    plan = _comb(2000, 4, 300)
    qkv = [x.float().requires_grad_() for x in _qkv(plan, (heads, 1), size)]
    with Allocations() as allocations:
        tree_attention(*qkv, plan, scale=1.0, impl="cpu").sum().backward()
    one_matrix = 4 * heads * plan.num_tokens**2
    assert allocations.largest < one_matrix / 50
    assert allocations.peak < one_matrix / 20
    assert all(chunk.kept is None for chunk in blocks_of(plan, None, 1).chunks)


def test_only_the_last_few_plans_are_remembered() -> None:
    plans = [_chains(3) for _ in range(10)]
    for plan in plans:
        assert blocks_of(plan, None, 1) is blocks_of(plan, None, 1)
    assert blocks_of.cache_info().currsize == 4
