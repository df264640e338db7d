"""Plans and inputs of tree attention, for its backends' tests."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import Ragged, StepPair, TreePlan
from tests.forests import forest_pairs, make_pair, nested_pairs


def plan_of(pairs: Sequence[StepPair], share: str = "tree") -> TreePlan:
    return build_batch(pairs, range(len(pairs)), share).plan


def star(leaves: int, root: int = 3, tail: int = 2) -> TreePlan:
    pairs = [make_pair([1] * root, [10 + 2 * i] * (tail + 1), [11 + 2 * i] * (tail + 1)) for i in range(leaves // 2)]
    return plan_of(pairs)


PLANS = {
    "forest": plan_of(forest_pairs()),
    "unshared": plan_of(nested_pairs(), "none"),
    "one token": plan_of([make_pair([1], [2], [3])]),
    "star": star(12),
}


def random_inputs(
    plan: TreePlan,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float64,
    sinks: bool = False,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(plan.num_tokens)
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    inputs = [torch.randn(plan.num_tokens, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    # heads before tokens in memory, as transformers has them
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    return [*inputs, torch.randn(heads[0], generator=generator, dtype=torch.float64).to(dtype)] if sinks else inputs


def no_tokens() -> TreePlan:
    nothing, zero = torch.empty(0, dtype=torch.int64).numpy(), torch.zeros(1, dtype=torch.int32)
    return TreePlan(keys=Ragged.from_rows(nothing, nothing, 0), cu_q=zero, cu_k=zero, max_q=0, max_k=0)


def described(
    sizes: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **more: Any
) -> dict[str, Any]:
    query, value = (
        SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(4, 2, s), requires_grad=False) for s in sizes
    )
    return {"query": query, "key": query, "value": value, **more}
