"""pack_padded: the forest of a padded batch and the way back, held against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels.packing import pack_padded
from stepdpo_kernels.packing.trie import spans
from stepdpo_kernels.types import StepDPOError

PAD = 7


@st.composite
def padded(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of few distinct tokens that share beginnings, padded on either side, with any pattern of losses."""
    pairs, width = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    ids = np.full((2 * pairs, width), PAD)
    real, wanted = np.zeros(ids.shape, np.int64), np.zeros(ids.shape, np.int64)
    for row in range(2 * pairs):
        length = draw(st.integers(1, width))
        begin = draw(st.sampled_from([0, width - length]))
        ids[row, begin : begin + length] = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        real[row, begin : begin + length] = 1
        wanted[row] = draw(st.lists(st.integers(0, 1), min_size=width, max_size=width))
    return torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(wanted)


@given(padded(), st.sampled_from(["tree", "pair", "none"]), st.booleans())
def test_every_wanted_token_finds_its_row_and_its_past(problem, share, every_token):
    ids, real, wanted = problem
    forest = pack_padded(ids, real, wanted, share=share, every_token=every_token)
    batch = forest.batch
    past = {}  # packed position -> the tokens up to it
    keys, cu_q, cu_k = batch.plan.keys.index, batch.plan.cu_q.tolist(), batch.plan.cu_k.tolist()
    for leaf in range(batch.plan.num_leaves):
        path = keys[cu_k[leaf] : cu_k[leaf + 1]]
        for position in range(cu_q[leaf], cu_q[leaf + 1]):
            depth = len(path) - (cu_q[leaf + 1] - position)
            past[position] = batch.input_ids[path[: depth + 1]].tolist()
    seen = iter(forest.tokens.index.tolist())
    branch_rows = []
    for row, sequence in enumerate(ids):
        at = real[row].nonzero()[:, 0]
        tokens, rows = sequence[at].tolist(), []
        for t in range(1, len(tokens)):
            column = int(at[t])
            assert forest.mask[row, column - 1] == bool(wanted[row, column])
            if wanted[row, column]:
                rows.append(next(seen))
                assert batch.targets[rows[-1]] == tokens[t]
                assert past[int(batch.rows.index[rows[-1]])] == tokens[:t]
        branch_rows += rows
        assert batch.branches.lengths[row] == len(rows) == forest.mask[row].sum()
        if forest.nodes:
            nodes = forest.nodes.index.view(ids.shape)[row, at].tolist()
            assert [past[node] for node in nodes] == [tokens[: t + 1] for t in range(len(tokens))]
    assert next(seen, None) is None
    assert batch.branches.index.tolist() == branch_rows
    assert (forest.nodes is not None) == every_token


@given(padded())
def test_common_beginnings_are_held_once(problem):
    ids, real, wanted = problem
    sequences = [tuple(row[mask > 0].tolist()) for row, mask in zip(ids, real, strict=True)]
    pairs = len(sequences) // 2

    def nodes(members: list[tuple[int, ...]]) -> int:
        kept = (s[: max(len(s) - 1, 1)] for s in members)
        return len({s[: n + 1] for s in kept for n in range(len(s))})

    tokens = {share: pack_padded(ids, real, wanted, share=share).batch.num_tokens for share in ("tree", "pair", "none")}
    assert tokens["tree"] == nodes(sequences)
    assert tokens["pair"] == sum(nodes([sequences[p], sequences[pairs + p]]) for p in range(pairs))
    assert tokens["none"] == sum(max(len(s) - 1, 1) for s in sequences)


def test_equal_edges_are_one_loss_row():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    forest = pack_padded(ids, torch.ones_like(ids), torch.tensor([[0, 0, 1, 1]] * 2))
    assert forest.batch.num_rows == 3
    assert forest.batch.targets[forest.tokens.index].tolist() == [3, 4, 3, 5]
    assert forest.to("cpu").batch.rows.index.equal(forest.batch.rows.index)


def test_the_transpose_of_rows_is_a_transpose():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    ragged = pack_padded(ids, torch.ones_like(ids), torch.ones_like(ids), every_token=True).nodes
    assert ragged
    index, lengths = ragged.index.numpy(), ragged.t_lengths.numpy()
    columns = np.repeat(np.arange(lengths.size), lengths)
    assert (index[ragged.t_index.numpy()] == columns).all()
    assert (spans(np.zeros(1, np.int64), np.array([8])) == np.sort(ragged.t_index.numpy())).all()


@pytest.mark.parametrize(
    ("ids", "real", "message"),
    [
        ([[1, 2]], [[1, 1]], r"\(2P, W\), got \(1, 2\)"),
        ([[1, 2], [1, 2]], [[1, 1]], r"\(2, 2\), \(1, 2\)"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], "sequence 1 of the batch has no tokens"),
        ([[1, 2, 3], [1, 2, 3]], [[1, 0, 1], [1, 1, 1]], "sequence 0 of the batch has padding between its tokens"),
    ],
)
def test_what_is_no_padded_batch_is_refused(ids, real, message):
    with pytest.raises(StepDPOError, match=message):
        pack_padded(torch.tensor(ids), torch.tensor(real), torch.ones_like(torch.tensor(ids)))
    with pytest.raises(ValueError, match="share must be one of"):
        pack_padded(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), share="all")
