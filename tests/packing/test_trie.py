"""Tries against sets of tuples."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing.trie import GrowingTrie, build_trie, common_prefix, path_positions, sort_key
from tests.forests import ALPHABET, prefixes_of, token_lists

_ids = token_lists(1, 6, ALPHABET)
_sequences = st.lists(st.one_of(_ids, token_lists(1, 5, ALPHABET[:2])), min_size=1, max_size=10)
_settings = settings(max_examples=150, deadline=None, derandomize=True)


def _array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


@_settings
@given(_ids, _ids)
def test_keys_sort_as_token_sequences(a: list[int], b: list[int]) -> None:
    assert (sort_key(_array(a)) < sort_key(_array(b))) == (a < b)
    assert sort_key(_array(a)).startswith(sort_key(_array(b))) == (a[: len(b)] == b)


@_settings
@given(token_lists(0, 6), token_lists(0, 6))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
    assert common_prefix(_array(a), _array(b)) == expected


@_settings
@given(_sequences)
def test_trie_against_the_set_of_prefixes(sequences: list[list[int]]) -> None:
    trie = build_trie([_array(s) for s in sequences])
    nodes = prefixes_of(sequences)
    leaves = [leaf.tolist() for leaf in trie.leaves]
    assert trie.num_nodes == len(nodes)
    # exactly the sequences that nothing continues, in order
    assert leaves == sorted(list(n) for n in nodes if not any(m[: len(n)] == n and m != n for m in nodes))
    for sequence, (leaf, length) in zip(sequences, trie.homes, strict=True):
        assert leaves[leaf][:length] == sequence


@_settings
@given(_sequences, st.integers(0, 5))
def test_paths_hold_every_node_once_and_spell_the_leaves(sequences: list[list[int]], offset: int) -> None:
    trie = build_trie([_array(s) for s in sequences])
    paths = path_positions(trie, offset)
    token_at = dict(enumerate(np.concatenate([le[s:] for le, s in zip(trie.leaves, trie.starts, strict=True)]), offset))
    node_at: dict[int, tuple[int, ...]] = {}
    for leaf, path in zip(trie.leaves, paths, strict=True):
        assert [token_at[p] for p in path.tolist()] == leaf.tolist()
        for depth, position in enumerate(path.tolist()):
            node = tuple(leaf[: depth + 1].tolist())
            assert node_at.setdefault(position, node) == node
    assert len(set(node_at.values())) == len(node_at) == trie.num_nodes
    assert sorted(node_at) == list(range(offset, offset + trie.num_nodes))


@_settings
@given(_sequences)
def test_growing_trie_counts_after_every_addition(sequences: list[list[int]]) -> None:
    trie = GrowingTrie()
    for n, sequence in enumerate(sequences, 1):
        trie.add(_array(sequence))
        assert trie.num_nodes == len(prefixes_of(sequences[:n]))
