"""Tree attention by FlexAttention as far as a CPU goes: its block masks, forward, and what it compiles."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels.ops.tree_attention import api, flex, reference
from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.types import StepPair, TreePlan
from tests.attention import PLANS, described, no_tokens, plan_of, random_inputs, star
from tests.forests import make_pair, step_pairs


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "BLOCK", 8)
    flex.block_mask.cache_clear()
    yield
    flex.block_mask.cache_clear()


def _dense(plan: TreePlan, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(T, T) bool: what the function of a block mask sees, and its partial and full blocks."""
    from torch.nn.attention.flex_attention import create_mask

    tokens = plan.num_tokens
    mask = flex.block_mask(plan, window)
    assert mask.seq_lengths == (tokens, tokens)
    seen = create_mask(mask.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0]
    count = -(-tokens // flex.BLOCK)

    def dense(many: Tensor | None, which: Tensor | None) -> Tensor:
        assert many is not None
        assert which is not None
        assert many.dtype == which.dtype == torch.int32
        blocks = torch.zeros(count, count, dtype=torch.bool)
        for row in range(count):
            blocks[row, which[0, 0, row, : many[0, 0, row]].long()] = True
        return blocks.repeat_interleave(flex.BLOCK, 0).repeat_interleave(flex.BLOCK, 1)

    partial = dense(mask.kv_num_blocks, mask.kv_indices)
    return seen, partial, dense(mask.full_kv_num_blocks, mask.full_kv_indices)


def _check_blocks(plan: TreePlan, window: int | None) -> tuple[int, int]:
    """How many blocks are partial and full, after checking that they are that."""
    tokens, size = plan.num_tokens, flex.BLOCK
    seen, partial, full = _dense(plan, window)
    assert torch.equal(seen, dense_mask(plan, window))
    assert not (partial & full).any()
    padded = torch.zeros_like(full)
    padded[:tokens, :tokens] = seen
    assert padded[full].all()
    assert not (padded & ~(partial | full)).any()
    return int(partial.sum()) // size**2, int(full.sum()) // size**2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    step_pairs(),
    st.sampled_from(["tree", "pair", "none"]),
    st.one_of(st.none(), st.integers(1, 9)),
    st.sampled_from([1, 2, 3, 8]),
)
def test_block_masks_of_any_forest(pairs: list[StepPair], share: str, window: int | None, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", size)
        flex.block_mask.cache_clear()
        _check_blocks(plan_of(pairs, share), window)
    flex.block_mask.cache_clear()


def test_blocks_that_nobody_sees_are_left_out(small_blocks: None) -> None:
    trees = plan_of([make_pair([i] * 40, [9], [9]) for i in range(1, 6)])  # five trees of 40 tokens in blocks of 8
    assert _check_blocks(trees, None) == (5 * 5, 5 * 10)  # the diagonal; what is before it in the same tree
    assert _check_blocks(trees, 8) == (5 * (5 + 4), 0)
    assert _check_blocks(trees, 24) == (5 * (5 + 2), 5 * (4 + 3))  # 16 to 23 tokens back: all seen
    # 20 leaves of 8 tokens on a root of 16: each sees itself and the root
    star = plan_of([make_pair([1] * 16, [10 + 2 * i] * 9, [11 + 2 * i] * 9) for i in range(10)])
    assert _check_blocks(star, None) == (2 + 20, 1 + 2 * 20)


def test_block_masks_made_in_inference_mode_can_be_trained_with() -> None:
    plan = plan_of([make_pair([1] * 40, [2], [3])])  # whose mask nobody has made
    with torch.inference_mode():
        mask = flex.block_mask(plan, 7)
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    of_queries = (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    read = [cell.cell_contents for cell in mask.mask_mod.__closure__ or ()]
    assert len(read) == 3
    assert not any(x.is_inference() for x in (*lists, *of_queries, *read) if x is not None)


def _flex_inputs(plan: TreePlan, sizes: tuple[int, int] = (16, 16), sinks: bool = False) -> list[Tensor]:
    return random_inputs(plan, sizes=sizes, dtype=torch.float32, sinks=sinks)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("softcap", "sinks"), list(product([None, 0.5], [False, True])))
def test_flex_forward_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, small_blocks: None, softcap: float | None, sinks: bool, window: int | None
) -> None:
    monkeypatch.setattr(flex, "compiled", lambda: flex._attend)
    plan = PLANS["forest"]
    *qkv, sink = _flex_inputs(plan, (16, 32), sinks=True)
    options = {"sliding_window": window, "softcap": softcap, "sinks": sink if sinks else None}
    ours = flex.tree_attention(*qkv, plan, scale=0.7, **options)
    assert ours.shape == (plan.num_tokens, 4, 32)
    torch.testing.assert_close(ours, reference.tree_attention(*qkv, plan, scale=0.7, **options), rtol=1e-5, atol=1e-5)


def test_flex_compiles_once_for_all_plans_and_windows() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    attend = torch.compile(flex._attend, dynamic=True, fullgraph=True, backend=counter)
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "compiled", lambda: attend)
        for plan, window in ((star(300, 20), None), (star(200), 7), (star(240, 40), 3)):
            qkv = _flex_inputs(plan)
            assert plan.num_tokens > flex.BLOCK  # a single block is a case of its own to torch's compiler
            ours = flex.tree_attention(*qkv, plan, scale=0.7, sliding_window=window)
            exact = reference.tree_attention(*qkv, plan, scale=0.7, sliding_window=window)
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
            compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled == compiled[:1] * 3


def test_past_the_limit_of_recompilations_flex_raises() -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    torch._dynamo.reset()
    flex.compiled.cache_clear()
    plan = PLANS["forest"]
    with torch._dynamo.config.patch(recompile_limit=1):
        flex.tree_attention(*_flex_inputs(plan), plan, scale=0.7)
        with pytest.raises(FailOnRecompileLimitHit):
            flex.tree_attention(*_flex_inputs(plan, (32, 32)), plan, scale=0.7)
    torch._dynamo.reset()
    flex.compiled.cache_clear()


def test_flex_without_tokens() -> None:
    inputs = [torch.empty(shape, requires_grad=True) for shape in ((0, 4, 16), (0, 2, 16), (0, 2, 8))]
    sinks = torch.tensor([0.5, torch.inf, -torch.inf, -2.0], dtype=torch.float64, requires_grad=True)
    for more in ([], [sinks]):
        output = flex.tree_attention(*inputs, no_tokens(), scale=1.0, sinks=sinks if more else None)
        assert (output.shape, output.dtype) == ((0, 4, 8), torch.float32)
        gradients = torch.autograd.grad(output.sum(), inputs + more)
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in inputs + more]
        assert not any(g.any() for g in gradients)


def test_flex_says_why_not() -> None:
    plan = PLANS["forest"]
    q, k, v = _flex_inputs(plan)
    assert flex.why_not({"query": q, "key": k, "value": v, "plan": plan}) == []
    wanted = {"query": q, "key": k, "value": v.clone().requires_grad_(), "plan": plan}
    assert flex.why_not({**wanted, "sinks": q[0, :, 0]}) == [
        "on the CPU it has no backward",
        "on the CPU it has no sinks",
    ]
    with torch.no_grad():
        assert flex.why_not(wanted) == []
        assert flex.why_not_auto(wanted) == ["on the CPU it is for tests"]
    assert flex.why_not(described(dtype=torch.float64)) == ["it takes float32, bfloat16 and float16, not torch.float64"]
    assert flex.why_not(described((16, 8))) == ["heads of at least 16, not 8"]
    assert flex.why_not(described((256, 512), sinks=object(), softcap=1.0, sliding_window=3)) == []
    assert flex.why_not(described(device="mps")) == ["it runs on CUDA, and forward on the CPU, not on mps"]
    with pytest.raises(
        ValueError, match="'flex' of tree_attention cannot take these inputs: on the CPU it has no back"
    ):
        api.tree_attention(q, k, wanted["value"], plan, scale=1.0, impl="flex")
