"""Tries against sets of tuples."""

from __future__ import annotations

from itertools import pairwise, takewhile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing.trie import Sequences, build_forest, common_prefix, spans
from tests.forests import ALPHABET, prefixes_of, token_lists

_ids = token_lists(1, 6, ALPHABET)
_sequence = st.one_of(_ids, token_lists(1, 5, ALPHABET[:2]))
_sequences = st.lists(_sequence, min_size=1, max_size=10)
_settings = settings(max_examples=150, deadline=None, derandomize=True)


def _array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _of(sequences: list[list[int]], cut: int = 0) -> Sequences:
    return Sequences.of((_array(s[:cut]), _array(s[cut:])) for s in sequences)


@_settings
@given(_ids, _ids)
def test_keys_sort_as_token_sequences(a: list[int], b: list[int]) -> None:
    first, second = _of([a, b]).keys
    assert (first < second) == (a < b)
    assert first.startswith(second) == (a[: len(b)] == b)


@_settings
@given(token_lists(0, 6), token_lists(0, 6))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
    assert common_prefix(_array(a), _array(b)) == expected


@_settings
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
def test_spans(pairs: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    assert spans(starts, lengths).tolist() == [s + i for s, n in pairs for i in range(n)]


@_settings
@given(_sequences, st.integers(0, 3), st.data())
def test_sequences_and_some_of_them(sequences: list[list[int]], cut: int, data: st.DataObject) -> None:
    every = _of(sequences, cut)
    numbers = data.draw(st.lists(st.integers(0, len(sequences) - 1)))
    some = every.take(numbers)
    for these, expected in ((every, sequences), (some, [sequences[i] for i in numbers])):
        assert [view.tolist() for view in these.views] == expected
        assert these.lengths.tolist() == [len(s) for s in expected]
        assert [these.tokens[b : b + n].tolist() for b, n in zip(these.begins, these.lengths, strict=True)] == expected
    assert some.tokens is every.tokens


@_settings
@given(st.lists(_sequences, max_size=4))
def test_forest_against_the_sets_of_prefixes(units: list[list[list[int]]]) -> None:
    """Of tries one after the other, each of its unit's sequences, and of a unit of all of them in another order."""
    flat = [s for unit in units for s in unit]
    numbers = iter(range(len(flat)))
    for sequences, of_units in (
        (_of(flat), [[next(numbers) for _ in unit] for unit in units]),
        (_of([*flat, [9]]).take(list(range(len(flat)))), [list(range(len(flat)))[::-1]]),
    ):
        forest = build_forest(sequences, of_units)
        cu_q, cu_k = forest.cu_q.tolist(), forest.cu_k.tolist()
        paths = [forest.paths[a:b].tolist() for a, b in pairwise(cu_k)]
        leaves = [forest.tokens[path].tolist() for path in paths]
        expected = []
        for unit in of_units:
            nodes = prefixes_of([flat[i] for i in unit])
            expected += sorted(list(n) for n in nodes if not any(m[: len(n)] == n and m != n for m in nodes))
        # exactly the sequences that nothing continues, in order, tree by tree
        assert leaves == expected
        assert forest.tokens.size == sum(len(prefixes_of([flat[i] for i in unit])) for unit in of_units)
        # each node is owned by the first leaf below it, at its depth, in one tree
        node_at: dict[int, tuple[int, tuple[int, ...]]] = {}
        ends = np.cumsum([len({forest.homes[i] for i in unit}) for unit in of_units])
        for leaf, (path, tokens) in enumerate(zip(paths, leaves, strict=True)):
            tree = int(np.searchsorted(ends, leaf, side="right"))
            for depth, node in enumerate(path):
                assert node_at.setdefault(node, (tree, tuple(tokens[: depth + 1]))) == (
                    tree,
                    tuple(tokens[: depth + 1]),
                )
                assert forest.depths[node] == depth
            assert path[-(cu_q[leaf + 1] - cu_q[leaf]) :] == list(range(cu_q[leaf], cu_q[leaf + 1]))
        assert sorted(node_at) == list(range(forest.tokens.size))
        assert len(set(node_at.values())) == len(node_at)
        for number, home in enumerate(forest.homes.tolist()):
            assert leaves[home][: len(flat[number])] == flat[number]
        index, counts = forest.paths_of_nodes()
        for node, places in enumerate(np.split(index, np.cumsum(counts)[:-1])):
            assert places.tolist() == np.flatnonzero(forest.paths == node).tolist()


@_settings
@given(_sequences, st.data())
def test_size_of_a_trie(sequences: list[list[int]], data: st.DataObject) -> None:
    members = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1))
    chosen = _of(sequences)
    forest = build_forest(chosen.take(members), [range(len(members))])
    assert chosen.trie_size(members) == (forest.tokens.size, forest.paths.size)
