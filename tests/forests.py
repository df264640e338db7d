"""Step pairs for tests: hypothesis strategies, a hand-made nested group, and what a trie is by brute force."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
from hypothesis import strategies as st

from stepdpo_kernels.types import StepPair

# Few distinct ids, so that prefixes coincide; bytes that compare differently when order or sign is handled wrongly.
ALPHABET = (0, 1, 255, 256, 70_000, 2**31 - 1)


# StepPair takes any sequences of integers; its fields are annotated with what they hold.
make_pair: Callable[..., StepPair] = StepPair


def token_lists(min_size: int, max_size: int, alphabet: Sequence[int] = ALPHABET[:3]) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(alphabet), min_size=min_size, max_size=max_size)


@st.composite
def step_pairs(draw: st.DrawFn, max_pairs: int = 6, alphabet: Sequence[int] = ALPHABET[:3]) -> list[StepPair]:
    """Pairs whose prefixes often nest, whose steps are often empty, equal, or a prefix of one another."""
    base = draw(token_lists(8, 8, alphabet))
    pairs = []
    for i in range(draw(st.integers(1, max_pairs))):
        prefix = base[: draw(st.integers(1, 8))] if draw(st.booleans()) else draw(token_lists(1, 6, alphabet))
        chosen = draw(token_lists(0, 4, alphabet))
        rejected = draw(
            st.one_of(token_lists(0, 4, alphabet), st.just(chosen), st.just(chosen[:2]), st.just([*chosen, 1, 1]))
        )
        group = draw(st.sampled_from(["", "a", "b"]))
        weight = draw(st.sampled_from([0.0, 0.5, 1.0, 2.25]))
        pairs.append(make_pair(prefix, chosen, rejected, id=f"p{i}", group=group, weight=weight))
    return pairs


def nested_pairs(vocab_size: int = 512, seed: int = 0, group: str = "problem") -> list[StepPair]:
    """Eight pairs of one problem, eight leaves, which branch off at four depths: what a packed forest must get right.

    Four steps follow one another; each is the chosen step after the steps before it, and each has rejected steps. Two
    rejected steps begin alike, one begins as its chosen step does and one is a prefix of it, one pair repeats a
    rejected step, and one has an empty step.
    """
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> list[int]:
        return rng.integers(3, vocab_size, n).tolist()

    prompt, steps = tokens(9), [tokens(n) for n in (6, 4, 7, 5)]
    context = [prompt + list(chain(*steps[:k])) for k in range(4)]
    twin = tokens(3)
    once = tokens(5)
    sides = [
        (0, steps[0], once),
        (0, tokens(4), once),
        (1, steps[1], twin + tokens(2)),
        (1, tokens(3), tokens(4)),
        (1, steps[1], twin + tokens(3)),
        (2, steps[2], steps[2][:3] + tokens(3)),
        (3, steps[3], steps[3][:2]),
        (3, steps[3] + tokens(2), []),
    ]
    weights = (1.0, 0.5, 1.0, 0.25, 2.0, 1.0, 1.5, 1.0)
    return [
        make_pair(context[k], chosen, rejected, id=f"{group}-{i}", group=group, weight=weights[i])
        for i, (k, chosen, rejected) in enumerate(sides)
    ]


def forest_pairs(vocab_size: int = 512, seed: int = 0) -> list[StepPair]:
    """Two nested groups and a lone pair, all after one system prompt."""
    rng = np.random.default_rng(seed + 100)
    system = rng.integers(3, vocab_size, 4).tolist()
    pairs = [*nested_pairs(vocab_size, seed, "first"), *nested_pairs(vocab_size, seed + 1, "second")[:4]]
    alone = make_pair(*(rng.integers(3, vocab_size, n).tolist() for n in (5, 3, 6)), id="alone")
    return [
        make_pair([*system, *p.prefix_ids], p.chosen_ids, p.rejected_ids, id=p.id, group=p.group, weight=p.weight)
        for p in [*pairs, alone]
    ]


def branches_of(pairs: Iterable[StepPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prefix, step) of every branch as tuples, chosen and rejected of pair 0, then of pair 1, ..."""
    return [
        (tuple(pair.prefix_ids.tolist()), tuple(step.tolist()))
        for pair in pairs
        for step in (pair.chosen_ids, pair.rejected_ids)
    ]


def prefixes_of(sequences: Iterable[Sequence[int]]) -> set[tuple[int, ...]]:
    """The nodes of the trie of these sequences, each as the tokens that lead to it."""
    return {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}


def nodes_by_brute_force(pairs: Sequence[StepPair], share: str) -> int:
    """How many forest nodes these pairs have: every distinct non-empty prefix of what is encoded, per sharing unit."""
    encoded = [prefix + step[:-1] for prefix, step in branches_of(pairs)]
    units = {
        "tree": [encoded],
        "pair": [encoded[i : i + 2] for i in range(0, len(encoded), 2)],
        "none": [[sequence] for sequence in encoded],
    }[share]
    return sum(len(prefixes_of(unit)) for unit in units)


def random_forest(
    rng: np.random.Generator,
    *,
    pairs: int,
    prompt: int,
    step: tuple[int, int],
    groups: int,
    vocab_size: int = 50_000,
) -> list[StepPair]:
    """Pairs of some problems, each a growing tree of solutions: a chosen step continues into prefixes of later pairs.

    Some pairs of one prefix have the same rejected step, some the same chosen one, some steps begin alike, few are
    empty. Prompts of about `prompt` tokens, steps of `step[0]` to `step[1]` tokens.
    """

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(low, high + 1)).tolist()

    system = tokens(0, 8)
    found: list[StepPair] = []
    contexts = [[system + tokens(max(prompt // 2, 1), 2 * prompt)] for _ in range(groups)]
    before: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for i in range(pairs):
        group = int(rng.integers(groups))
        prefix = contexts[group][rng.integers(len(contexts[group]))]
        chosen, rejected = tokens(*step), tokens(*step)
        luck = rng.random()
        if tuple(prefix) in before and luck < 0.5:
            if luck < 0.25:
                chosen = before[tuple(prefix)][0]
            else:
                rejected = before[tuple(prefix)][1]
        elif luck > 0.9:
            rejected = [*chosen[: len(chosen) // 2], *rejected]
        elif luck > 0.88:
            chosen = []
        before[tuple(prefix)] = chosen, rejected
        if chosen:
            contexts[group].append([*prefix, *chosen, *tokens(0, 2)])
        found.append(make_pair(prefix, chosen, rejected, id=f"{group}-{i}", group=f"problem {group}"))
    return found
