"""What a StepPair accepts and refuses, and what moves with a batch."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import Ragged, StepDPOError
from tests.forests import forest_pairs, make_pair


@pytest.mark.parametrize(
    "ids",
    [[5, 0, 7], (5, 0, 7), np.array([5, 0, 7]), np.array([5, 0, 7], np.uint8), torch.tensor([5, 0, 7])],
    ids=["list", "tuple", "int64", "uint8", "tensor"],
)
def test_any_flat_sequence_of_integers_is_stored_as_read_only_int32(ids: Any) -> None:
    pair = make_pair(ids, ids, [])
    for stored in (pair.prefix_ids, pair.chosen_ids):
        assert stored.dtype == np.int32
        assert stored.tolist() == [5, 0, 7]
        with pytest.raises(ValueError, match="read-only"):
            stored[0] = 1
    assert pair.rejected_ids.dtype == np.int32
    assert pair.rejected_ids.size == 0


def test_the_callers_array_stays_the_callers() -> None:
    ids = np.array([1, 2, 3], np.int32)
    pair = make_pair(ids, [1], [2])
    ids[0] = 9
    assert pair.prefix_ids.tolist() == [1, 2, 3]


def test_a_pair_is_a_value() -> None:
    one, same = (make_pair([1, 2], [3], [4], id="a", group="g", weight=0.5) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != "a"
    for other in (
        make_pair([1], [2, 3], [4], id="a", group="g", weight=0.5),  # the same tokens, cut elsewhere
        make_pair([1, 2], [4], [3], id="a", group="g", weight=0.5),
        make_pair([1, 2], [3], [4], id="b", group="g", weight=0.5),
        make_pair([1, 2], [3], [4], id="a", group="h", weight=0.5),
        make_pair([1, 2], [3], [4], id="a", group="g", weight=1.0),
    ):
        assert one != other
    with pytest.raises(FrozenInstanceError):
        one.weight = 2.0
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


@pytest.mark.parametrize("field", ["prefix_ids", "chosen_ids", "rejected_ids"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, -1], r"a token id outside 0\.\.2\^31-1: -1\.\.1"),
        ([2**31, 1], r"a token id outside 0\.\.2\^31-1: 1\.\.2147483648"),
        ([2**70], "flat sequence of integers"),
        ([1.0, 2.0], "flat sequence of integers"),
        ([True, False], "flat sequence of integers"),
        ([[1, 2]], "flat sequence of integers"),
        ("12", "flat sequence of integers"),
        (7, "flat sequence of integers"),
        (None, "flat sequence of integers"),
        ([[1, 2], [3]], "flat sequence of integers"),
    ],
    ids=["negative", "2^31", "2^70", "float", "bool", "nested", "text", "scalar", "none", "ragged"],
)
def test_bad_token_ids_name_the_pair_and_the_field(field: str, value: Any, message: str) -> None:
    ids = {"prefix_ids": [1], "chosen_ids": [2], "rejected_ids": [3], field: value}
    with pytest.raises(StepDPOError, match=rf"pair 'record 3': {field} .*{message}"):
        make_pair(**ids, id="record 3")


def test_an_empty_prefix_is_refused() -> None:
    with pytest.raises(StepDPOError, match=r"pair 'record 3': prefix_ids is empty.*BOS"):
        make_pair([], [1], [2], id="record 3")


@pytest.mark.parametrize(
    "weight",
    [
        -0.1,
        float("nan"),
        float("inf"),
        None,
        "1",
    ],
)
def test_a_bad_weight_names_the_pair(weight: Any) -> None:
    with pytest.raises(StepDPOError, match=rf"pair 'record 3': weight must be finite and >= 0, got {weight!r}"):
        make_pair([1], [2], [3], id="record 3", weight=weight)


def test_errors_can_be_caught_as_value_errors() -> None:
    assert issubclass(StepDPOError, ValueError)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=6))
def test_ragged_is_a_matrix_and_its_transpose(rows: list[list[int]]) -> None:
    lengths = np.array([len(row) for row in rows], np.int64)
    index = np.array([column for row in rows for column in row], np.int64)
    ragged = Ragged.from_rows(index, lengths, columns=6)
    cuts = np.cumsum(ragged.t_lengths.numpy())[:-1]
    columns = [column.tolist() for column in np.split(ragged.t_index.numpy(), cuts)]
    assert columns == [[r for r, row in enumerate(rows) for c in row if c == column] for column in range(6)]
    assert ragged.index.tolist() == index.tolist()
    assert ragged.lengths.tolist() == lengths.tolist()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for f in fields(value) for tensor in _tensors(getattr(value, f.name))]
    return []


def test_every_tensor_of_a_batch_moves() -> None:
    batch = build_batch(forest_pairs(), range(13), "tree")
    moved = batch.to("meta")
    assert len(_tensors(moved)) == len(_tensors(batch)) == 21
    assert {tensor.device.type for tensor in _tensors(moved)} == {"meta"}
    assert {tensor.device.type for tensor in _tensors(batch)} == {"cpu"}
    assert [t.shape for t in _tensors(moved)] == [t.shape for t in _tensors(batch)]
    assert (moved.plan.max_q, moved.plan.max_k) == (batch.plan.max_q, batch.plan.max_k)
    assert (moved.pair_ids, moved.tokens_unshared) == (batch.pair_ids, batch.tokens_unshared)
    assert (moved.num_tokens, moved.num_rows, moved.num_pairs) == (batch.num_tokens, batch.num_rows, 13)
    assert moved.plan.num_leaves == batch.plan.num_leaves
    assert {t.device.type for t in _tensors(batch.plan.to("meta"))} == {"meta"}


def test_a_batch_is_moved_and_never_cast() -> None:
    batch = build_batch([make_pair([1], [2], [3])], [0], "tree")
    assert [t.dtype for t in _tensors(batch.to("meta").plan)] == [t.dtype for t in _tensors(batch.plan)]
    with pytest.raises(TypeError):
        batch.to(torch.bfloat16)
