"""The plain padded layout that packing is held against."""

from __future__ import annotations

from hypothesis import given, settings

from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.types import StepPair
from tests.forests import branches_of, make_pair, step_pairs


def test_by_hand() -> None:
    batch = padded_batch([make_pair([1, 2], [3, 4, 5], [6]), make_pair([7], [], [8, 9])], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 99, 99, 99, 99], [1, 2, 6, 99, 99], [7, 8, 9, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    no = -100
    assert batch["labels"].tolist() == [[no, 3, 4, 5, no], [no] * 5, [no, 6, no, no, no], [8, 9, no, no, no]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(step_pairs())
def test_every_branch_is_written_out(pairs: list[StepPair]) -> None:
    batch = padded_batch(pairs, pad_token_id=5)
    branches = branches_of(pairs)
    for row, (prefix, step) in enumerate([*branches[0::2], *branches[1::2]]):
        n = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :n].tolist() == [*prefix, *step]
        assert (batch["input_ids"][row, n:] == 5).all()
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == list(step)
        # a label stands where the token before it is the input
        for t in (labels != -100).nonzero()[:, 0].tolist():
            assert batch["input_ids"][row, t + 1] == labels[t]
