"""What a process does for a provider of the `data` suite."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.lengths import draw_lengths, pairs_of
from benchmarks.registry import Case, Task
from benchmarks.suites.data import records
from benchmarks.suites.data.providers import IGNORED, LOAD, PACK, Ids, texts, tokenizer_of
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import PackedBatch, StepPair

VOCABULARY = 49_152
UNLIMITED = 10**9
SMALL = 60  # pairs that are verified

# Of a pair that was read from a batch: prefix and right step, the right step, prefix and wrong step, the wrong step.
Branches = tuple[tuple[int, ...], ...]


def tolerance(case: Case) -> float:
    """Of the share of pairs that are not what they should be."""
    return 0.0


def needs(provider: str, case: Case) -> int:
    return 0


def prepare(case: Case, folder: Path) -> None:
    """Files for the records; token ids are made by each process from a seed."""
    if case["of"] == "records":
        records.write(folder, case["pairs"])


def load(provider: str, case: Case, folder: Path) -> Task:
    if case["of"] == "records":
        return Call(LOAD[provider](folder), lambda _: {})
    pairs = made_pairs(case["pairs"])
    return Call(PACK[provider](pairs), lambda result: pack_facts(result, pairs))


def errors(provider: str, case: Case) -> dict[str, float]:
    if provider in ("tokenizer", "concatenate"):
        return {}
    if case["of"] == "pairs":
        return {"error": wrong_pairs(provider, made_pairs(SMALL))}
    with TemporaryDirectory(prefix="stepdpo-") as folder:
        prepare({**case, "pairs": SMALL}, Path(folder))
        return {"error": wrong_ids(provider, Path(folder))}


class Call:
    """A function of no arguments, and what its result says."""

    note = ""

    def __init__(self, run: Callable[[], Any], facts: Callable[[Any], dict[str, float]]) -> None:
        self.run, self._facts_of = run, facts
        self.facts: dict[str, float] = {}

    def value(self, outputs: Any) -> None:
        self.facts = self._facts_of(outputs)

    def errors(self, outputs: Any) -> dict[str, float]:
        return {}


def made_pairs(count: int) -> list[StepPair]:
    return pairs_of(draw_lengths(count), VOCABULARY)


# ---- records to token ids -------------------------------------------------------------------------------------------


def ids_of(result: Any, eos: int) -> Ids:
    """Of each pair, without an end-of-text token after a step."""
    if isinstance(result, list):
        rows = [tuple(list(map(int, part)) for part in row) for row in result]
    else:
        columns = (result[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        rows = list(zip(*columns, strict=True))
    return [(p, *(step[:-1] if step[-1:] == [eos] else step for step in steps)) for p, *steps in rows]  # type: ignore[misc]


def wrong_ids(provider: str, folder: Path) -> float:
    """Share of pairs that are not prefix and step tokenised together and cut where the step begins."""
    tokenizer = tokenizer_of(folder)
    found = ids_of(LOAD[provider](folder)(), tokenizer.eos_token_id)
    wrong = 0
    for (prefix, *steps), ids in zip(texts(folder), found, strict=True):
        cut = len(tokenizer(prefix).input_ids)
        branches = [tokenizer(prefix + step).input_ids for step in steps]
        wrong += ids != (branches[0][:cut], branches[0][cut:], branches[1][cut:])
    return wrong / len(found)


# ---- token ids to batches -------------------------------------------------------------------------------------------


def wrong_pairs(provider: str, pairs: list[StepPair]) -> float:
    """Share of pairs that cannot be read back from the batches, or are there too often."""
    expected = Counter(
        tuple(ids for step in (p.chosen_ids, p.rejected_ids) for ids in (branch(p.prefix_ids, step), branch(step)))
        for p in pairs
    )
    found = Counter(pairs_in(PACK[provider](pairs)()))
    return max((expected - found).total(), (found - expected).total()) / expected.total()


def branch(*parts: Any) -> tuple[int, ...]:
    return tuple(int(token) for part in parts for token in part)


def pairs_in(batches: Any) -> Iterator[Branches]:
    for batch in batches:
        yield from packed_pairs(batch) if isinstance(batch, PackedBatch) else padded_pairs(batch)


def padded_pairs(batch: Any) -> Iterator[Branches]:
    """Right steps are the first half of the rows, wrong steps the second."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    of_step = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != IGNORED
    found = [(branch(i[r].tolist()), branch(i[s].tolist())) for i, r, s in zip(ids, real, of_step, strict=True)]
    half = len(found) // 2
    yield from (right + wrong for right, wrong in zip(found[:half], found[half:], strict=True))


def packed_pairs(batch: PackedBatch) -> Iterator[Branches]:
    """Along the leaf's path down to the node that predicts a step's last token, and that token."""
    plan = batch.plan
    rows = batch.branches.index.split(batch.branches.lengths.tolist())

    def read(number: int) -> Branches:
        own = rows[number]
        last = int(batch.rows.index[own[-1]])
        leaf = int(torch.searchsorted(plan.cu_q, last, right=True)) - 1
        path = plan.keys.index[int(plan.cu_k[leaf]) : int(plan.cu_k[leaf + 1])]
        way = batch.input_ids[path[: int(batch.position_ids[last]) + 1]].tolist()
        step = batch.targets[own].tolist()
        return branch(way, step[-1:]), branch(step)

    yield from (read(c) + read(r) for c, r in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True))


def pack_facts(result: Any, pairs: list[StepPair]) -> dict[str, float]:
    """Tokens, padding among them, beside those of the forest of all pairs."""
    unique = pack_pairs(pairs, UNLIMITED)[0].num_tokens
    if isinstance(result, torch.Tensor):
        return {"unique_tokens": unique}
    tokens = sum(b.num_tokens if isinstance(b, PackedBatch) else b["input_ids"].numel() for b in result)
    return {"tokens": tokens, "unique_tokens": unique, "of_unique": tokens / unique, "batches": len(result)}
