"""Tries that are cut: nothing lost, no part over a budget, few tokens encoded twice."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing import plan_bins
from stepdpo_kernels.packing.batch import node_sequences
from stepdpo_kernels.packing.cut import Cutter, Part
from stepdpo_kernels.packing.pack import size_of_pair
from stepdpo_kernels.types import StepPair
from tests.forests import make_pair, nested_pairs, nodes_by_brute_force, random_forest, step_pairs

_settings = settings(max_examples=120, deadline=None, derandomize=True)


def _cut(pairs: list[StepPair], max_tokens: int, max_keys: int | None = None) -> list[Part]:
    sizes = [size_of_pair(pair, "tree") for pair in pairs]
    return Cutter(pairs, node_sequences(pairs), sizes, max_tokens, max_keys).cut(range(len(pairs)))


def _keys(pairs: list[StepPair], members: list[int]) -> int:
    return node_sequences(pairs).trie_size(b for i in members for b in (2 * i, 2 * i + 1))[1]


@_settings
@given(step_pairs(max_pairs=12), st.integers(0, 12), st.none() | st.integers(0, 12))
def test_parts_hold_every_pair_and_keep_their_sizes(pairs: list[StepPair], slack: int, more: int | None) -> None:
    sizes = [size_of_pair(pair, "tree") for pair in pairs]
    max_tokens = max(size.tokens for size in sizes) + slack
    max_keys = None if more is None else max(size.keys for size in sizes) + more
    parts = _cut(pairs, max_tokens, max_keys)
    assert sorted(chain(*(part.members for part in parts))) == list(range(len(pairs)))
    for part in parts:
        assert part.tokens == nodes_by_brute_force([pairs[i] for i in part.members], "tree") <= max_tokens
        assert part.keys == _keys(pairs, part.members)
        assert max_keys is None or part.keys <= max_keys
    assert parts == _cut(list(pairs), max_tokens, max_keys)
    whole = nodes_by_brute_force(pairs, "tree")
    if whole <= max_tokens and max_keys is None:
        assert len(parts) == 1


def test_a_cut_is_made_where_it_costs_least() -> None:
    """Two solutions of one problem, three pairs each: the budget holds one solution, not both, and each is whole."""
    rng = np.random.default_rng(0)

    def tokens(n: int) -> list[int]:
        return rng.integers(3, 1000, n).tolist()

    prompt = tokens(20)
    pairs = []
    for name in "ab":
        context = [*prompt, *tokens(30)]
        pairs += [make_pair(context, tokens(6), tokens(6), id=f"{name}{i}") for i in range(3)]
    shuffled = [pairs[i] for i in (4, 0, 3, 1, 5, 2)]
    one = nodes_by_brute_force(pairs[:3], "tree")
    parts = _cut(shuffled, one + 5)
    assert sorted(sorted(shuffled[i].id for i in part.members) for part in parts) == [
        ["a0", "a1", "a2"],
        ["b0", "b1", "b2"],
    ]
    assert sum(part.tokens for part in parts) == nodes_by_brute_force(pairs, "tree") + len(prompt)


def test_a_pair_stays_with_the_steps_that_follow_its_own() -> None:
    """The chosen step of one pair is the beginning of the next one's prefix: apart, it would be encoded twice."""
    prompt, step, other = list(range(10, 20)), list(range(30, 60)), list(range(70, 100))
    first = make_pair(prompt, step, [200, 201], id="first")
    later = make_pair([*prompt, *step, 5], [6, 7, 8], [9, 9, 9], id="later")
    elsewhere = make_pair([*prompt, *other], [6, 7, 8], [9, 9, 9], id="elsewhere")
    pairs = [elsewhere, first, later]
    parts = _cut(pairs, nodes_by_brute_force([first, later], "tree"))
    assert sorted(sorted(part.members) for part in parts) == [[0], [1, 2]]


def test_pairs_of_one_prefix_are_cut_by_the_step_that_they_share() -> None:
    prompt = list(range(10, 20))
    wrong = [list(range(100 * k, 100 * k + 20)) for k in (1, 2)]
    pairs = [make_pair(prompt, [50 + i, 50 + i], wrong[i % 2], id=str(i)) for i in range(8)]
    budget = nodes_by_brute_force(pairs[0::2], "tree")
    assert sorted(sorted(part.members) for part in _cut(pairs, budget)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # even one of them is too many: cut again, each part with the step
    smaller = _cut(pairs, budget - 1)
    assert len(smaller) == 4
    assert all(len({i % 2 for i in part.members}) == 1 for part in smaller)


def test_sub_tries_cost_less_than_stretches_of_the_sorted_order() -> None:
    """Tokens encoded more than once, and parts, against filling one part after the other in sorted order."""
    totals = {"ours": [0, 0], "sorted": [0, 0]}
    for seed in range(12):
        pairs = random_forest(np.random.default_rng(seed), pairs=40, prompt=40, step=(4, 20), groups=1)
        budget = 3 * max(size_of_pair(pair).tokens for pair in pairs)
        whole = nodes_by_brute_force(pairs, "tree")
        order = sorted(range(len(pairs)), key=lambda i: (pairs[i].prefix_ids.tolist(), i))
        stretches: list[list[int]] = [[]]
        for i in order:
            if nodes_by_brute_force([pairs[k] for k in [*stretches[-1], i]], "tree") > budget:
                stretches.append([])
            stretches[-1].append(i)
        for name, parts in (("ours", [part.members for part in _cut(pairs, budget)]), ("sorted", stretches)):
            encoded = sum(nodes_by_brute_force([pairs[i] for i in members], "tree") for members in parts)
            totals[name][0] += encoded - whole
            totals[name][1] += len(parts)
    assert totals["ours"][0] < 0.8 * totals["sorted"][0]
    assert totals["ours"][1] <= 1.05 * totals["sorted"][1]


def test_long_chains_of_steps_are_cut_without_recursion() -> None:
    base = list(range(3, 4 * 3000))
    pairs = [make_pair(base[: 4 * i + 4], base[4 * i + 4 : 4 * i + 8], [1, 2], id=str(i)) for i in range(2000)]
    whole = 4 * 2000 + 3 + 2000
    parts = _cut(pairs, 9000)
    assert len(parts) == 2
    # one cut, and what it costs is the path above it
    assert sum(part.tokens for part in parts) < 9000 + whole
    assert sorted(chain(*(part.members for part in parts))) == list(range(2000))


def test_groups_that_outgrow_the_budget_fill_the_same_bins_as_others() -> None:
    pairs = [*nested_pairs(seed=0, group="a"), *nested_pairs(seed=1, group="b")]
    budget = max(size_of_pair(pair).tokens for pair in pairs) + 10
    bins = plan_bins(pairs, budget)
    assert sorted(chain(*bins)) == list(range(16))
    for indices in bins:
        assert nodes_by_brute_force([pairs[i] for i in indices], "tree") <= budget
