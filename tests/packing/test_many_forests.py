"""Thousands of random forests through the planner: every property, and memory in proportion to what is packed."""

from __future__ import annotations

import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch

from stepdpo_kernels.packing import SHARE_MODES, build_batch, pack_pairs, plan_ranks, savings
from stepdpo_kernels.packing.pack import size_of_pair
from stepdpo_kernels.packing.reference import unpack
from stepdpo_kernels.types import PackedBatch, StepPair
from tests.forests import make_pair, nodes_by_brute_force, random_forest


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if dataclasses.is_dataclass(value):
        return sum(_bytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    return 0


def _check(batch: PackedBatch, pairs: list[StepPair], share: str) -> None:
    """Paths, positions, rows, targets and branches, and what the tensors weigh."""
    mine = [pairs[i] for i in batch.pair_index.tolist()]
    assert batch.num_tokens == nodes_by_brute_force(mine, share)
    plan, keys = batch.plan, batch.plan.keys.index.numpy()
    cu_q, cu_k = plan.cu_q.numpy(), plan.cu_k.numpy()
    position = batch.position_ids.numpy()
    # every path runs from depth 0 down to its leaf's own nodes, which are the packed tokens in order
    ends = np.repeat(cu_k[1:] - cu_q[1:], np.diff(cu_q)) + np.arange(batch.num_tokens)
    assert (keys[ends] == np.arange(batch.num_tokens)).all()
    assert (position[keys] == np.arange(keys.size) - np.repeat(cu_k[:-1], np.diff(cu_k))).all()
    assert (np.diff(batch.rows.index.numpy()) >= 0).all()
    readable = [p for p in mine if p.chosen_ids.size or p.rejected_ids.size]
    assert len(readable) == len(mine)
    for found, pair in zip(unpack(batch), mine, strict=True):
        assert (found.id, found.weight) == (pair.id, pair.weight)
        for name in ("prefix_ids", "chosen_ids", "rejected_ids"):
            assert np.array_equal(getattr(found, name), getattr(pair, name))
    # bytes: 24 a token, 24 a key, 32 a row, 8 for each row of a branch and back, and the branches' and leaves' own
    edges = batch.branches.index.numel()
    linear = batch.num_tokens + keys.size + batch.num_rows + edges + batch.num_pairs + 1
    assert _bytes(batch) <= 48 * linear


def _one(seed: int) -> tuple[int, int]:
    """A random forest, packed in one of many ways. Returns its tokens and its unshared tokens."""
    rng = np.random.default_rng(seed)
    pairs = random_forest(
        rng,
        pairs=int(rng.integers(1, 24)),
        prompt=int(rng.integers(1, 40)),
        step=(1, int(rng.integers(1, 16))),
        groups=int(rng.integers(1, 5)),
        vocab_size=int(rng.choice([2, 5, 50, 50_000])),
    )
    share = SHARE_MODES[seed % 3]
    sizes = [size_of_pair(pair, share) for pair in pairs]
    budget = max(size.tokens for size in sizes) + int(rng.integers(0, 120))
    max_keys = max(size.keys for size in sizes) + int(rng.integers(0, 400)) if rng.random() < 0.5 else None
    ranks = int(rng.integers(1, 4))
    if ranks == 1:
        batches = pack_pairs(pairs, budget, share=share, max_keys=max_keys)
    else:
        bins = plan_ranks(pairs, budget, ranks, share=share, max_keys=max_keys)
        counts = [len(own) for own in bins]
        assert max(counts) - min(counts) <= 1
        batches = [build_batch(pairs, indices, share) for own in bins for indices in own]
    assert sorted(chain(*(batch.pair_index.tolist() for batch in batches))) == list(range(len(pairs)))
    for batch in batches:
        assert 0 < batch.num_tokens <= budget
        assert max_keys is None or batch.plan.keys.index.numel() <= max_keys
        _check(batch, pairs, share)
    total = savings(batches)
    return int(total["tokens"]), int(total["tokens_unshared"])


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_forests(count: int) -> None:
    tokens, unshared = np.sum([_one(seed) for seed in range(count)], axis=0)
    assert tokens < 0.7 * unshared  # they do share


def test_memory_grows_with_what_is_packed() -> None:
    """Twice as many problems take about twice the bytes."""
    weights = []
    for groups in (8, 16, 32):
        pairs = random_forest(np.random.default_rng(1), pairs=4 * groups, prompt=90, step=(8, 40), groups=groups)
        batch = build_batch(pairs, range(len(pairs)), "tree")
        weights.append(_bytes(batch) / (batch.num_tokens + batch.plan.keys.index.numel() + batch.num_rows))
    assert max(weights) < 1.2 * min(weights)


def test_planning_needs_memory_in_proportion_too() -> None:
    import tracemalloc

    peaks = []
    for depth in (500, 1000, 2000):
        base = np.random.default_rng(0).integers(0, 50_000, depth + 10)
        pairs = [make_pair(base[:depth], [i, i, i], [i, 0, 1], id=str(i), group="g") for i in range(100)]
        tracemalloc.start()
        (batch,) = pack_pairs(pairs, 4000)
        peaks.append(tracemalloc.get_traced_memory()[1] / (batch.num_tokens + batch.plan.keys.index.numel()))
        tracemalloc.stop()
    assert max(peaks) < 150
    assert peaks[-1] < 1.5 * peaks[0]
