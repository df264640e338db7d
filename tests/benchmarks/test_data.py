"""Every provider of the data suite is right, what is wrong is caught, and the records are like real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.lengths import draw_lengths
from benchmarks.registry import Provider, task_module
from benchmarks.suites.data import LOAD_PROVIDERS, PACK_PROVIDERS, WORKLOADS, providers, records, task
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import StepPair

RECORDS, PAIRS = {"of": "records", "pairs": 60}, {"of": "pairs", "pairs": 60}


def names(of: tuple[Provider, ...]) -> list[str]:
    return [p.name for p in of if p.role != "floor"]


# ---- records to token ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names(LOAD_PROVIDERS))
def test_every_loader_gives_the_same_ids(name: str) -> None:
    if name == "trl":
        pytest.importorskip("trl")
        pytest.importorskip("datasets")
    assert task.errors(name, RECORDS) == {"error": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("records")
    task.prepare({"of": "records", "pairs": 1000}, made)
    return made


def test_texts_are_as_long_as_those_of_real_pairs(folder: Path) -> None:
    lengths, ids = draw_lengths(1000), task.ids_of(providers.load_ours(folder)(), -1)
    for part, wanted in enumerate(zip(*((of.prefix, of.chosen, of.rejected) for of in lengths), strict=True)):
        got = [len(row[part]) for row in ids]
        assert np.mean(got) == pytest.approx(np.mean(wanted), rel=0.05)
        assert np.corrcoef(got, wanted)[0, 1] > 0.95


def test_words_take_more_than_a_token_now_and_then() -> None:
    tokens = records.tokens_of_words(records.trained_tokenizer())
    stream = records.some_words(seed=3)
    taken = [tokens[f" {next(stream)}"] for _ in range(2000)]
    assert 1.05 < np.mean(taken) < 1.6


def test_prefixes_of_a_problem_lie_along_one_solution(folder: Path) -> None:
    several = 0
    for _, group in groupby(providers.read(folder), key=lambda record: record["answer"]):
        mine = list(group)
        assert len({record["prompt"] for record in mine}) == 1
        prefixes = sorted({record["initial_reason_steps"] for record in mine}, key=len)
        several += len(prefixes) > 1
        assert all(longer.startswith(shorter) for shorter, longer in pairwise(prefixes))
        assert all(len({r["chosen"] for r in mine if r["initial_reason_steps"] == p}) == 1 for p in prefixes)
    assert several > 50


def test_a_token_that_is_lost_or_moved_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(change: Callable[[Any], Any]) -> Callable[[Path], Callable[[], Any]]:
        return lambda folder: lambda: change(task.ids_of(providers.load_ours(folder)(), -1))

    faults = {
        "order": lambda rows: rows[::-1],
        "steps": lambda rows: [(p, r, c) for p, c, r in rows],
        "boundary": lambda rows: [(p[:-1], p[-1:] + c, p[-1:] + r) for p, c, r in rows],
        "last": lambda rows: [(p, c, r[:-1]) for p, c, r in rows],
    }
    for name, fault in faults.items():
        monkeypatch.setitem(providers.LOAD, name, changed(fault))
        assert task.errors(name, RECORDS)["error"] > 0.9, name


def test_the_end_that_trl_adds_is_taken_off() -> None:
    columns = {"prompt_ids": [[5, 6]], "chosen_ids": [[7, 0]], "rejected_ids": [[8, 9]]}
    assert task.ids_of(columns, eos=0) == [([5, 6], [7], [8, 9])]


# ---- token ids to batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names(PACK_PROVIDERS))
def test_every_packing_holds_every_pair(name: str) -> None:
    if name == "trl-padded":
        pytest.importorskip("trl")
    assert task.errors(name, PAIRS) == {"error": 0.0}


FAULTS: dict[str, Callable[[list[StepPair]], list[StepPair]]] = {
    "a pair is lost": lambda pairs: pairs[:-1],
    "a pair is there twice": lambda pairs: [*pairs, pairs[0]],
    "steps change places": lambda pairs: (
        [replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs[:1]] + pairs[1:]
    ),
    # The first and the last, for they are of different problems.
    "wrong steps of two pairs change places": lambda pairs: [
        replace(pairs[0], rejected_ids=pairs[-1].rejected_ids),
        *pairs[1:-1],
        replace(pairs[-1], rejected_ids=pairs[0].rejected_ids),
    ],
    "a token of a prefix": lambda pairs: [replace(pairs[0], prefix_ids=pairs[0].prefix_ids[1:]), *pairs[1:]],
    "the last token": lambda pairs: [replace(pairs[0], chosen_ids=pairs[0].chosen_ids[:-1]), *pairs[1:]],
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("name", ["ours", "ours-none", "transformers-padded"])
def test_a_packing_that_is_not_of_the_pairs_is_caught(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = providers.PACK[name]
    monkeypatch.setitem(providers.PACK, "wrong", lambda pairs: right(FAULTS[fault](pairs)))
    changed = 2 if "two pairs" in fault else 1
    assert task.errors("wrong", PAIRS)["error"] == pytest.approx(changed / task.SMALL)


def test_tokens_are_counted_with_their_padding() -> None:
    pairs = task.made_pairs(60)
    facts = {
        name: task.pack_facts(providers.PACK[name](pairs)(), pairs)
        for name in ("ours", "ours-pair", "ours-none", "transformers-padded", "concatenate")
    }
    sizes = [(p.prefix_ids.size, p.chosen_ids.size, p.rejected_ids.size) for p in pairs]
    # A step's last token is a target, and no node.
    assert facts["ours-none"]["tokens"] == sum(2 * p + c + r - 2 for p, c, r in sizes)
    assert facts["ours-pair"]["tokens"] < facts["ours-none"]["tokens"] < facts["transformers-padded"]["tokens"]
    ordered = sorted(p + max(c, r) for p, c, r in sizes)
    longest = [max(ordered[i : i + 8]) for i in range(0, 60, 8)]
    assert facts["transformers-padded"]["tokens"] == sum(
        2 * len(ordered[8 * i : 8 * i + 8]) * n for i, n in enumerate(longest)
    )
    one = pack_pairs(pairs, 10**9)[0].num_tokens
    assert {of["unique_tokens"] for of in facts.values()} == {one}
    assert facts["ours"]["of_unique"] == facts["ours"]["tokens"] / one
    assert 1 <= facts["ours"]["of_unique"] < 1.1 < facts["ours-pair"]["of_unique"]


# ---- the suite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_of_it_runs_on_the_host(device: str) -> None:
    for workload in WORKLOADS:
        assert all(set(p.devices) == {"cpu", "cuda"} for p in workload.providers)
        assert [case["pairs"] for case in workload.cases(device, "full")] == [64, 256, 1024]
        sizes = [workload.cases(device, size) for size in ("tiny", "quick", "full")]
        assert {case["device"] for cases in sizes for case in cases} == {"cpu"}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_the_floor_reads_all_of_it(workload: Any, tmp_path: Path) -> None:
    (case,) = workload.cases("cpu", "tiny")
    (floor,) = [p.name for p in workload.providers if p.role == "floor"]
    module = task_module("data")
    module.prepare(case, tmp_path)
    outputs = module.load(floor, case, tmp_path).run()
    if workload.name == "data-pack":
        expected = [2 * p.prefix_ids.size + p.chosen_ids.size + p.rejected_ids.size for p in task.made_pairs(16)]
        assert isinstance(outputs, torch.Tensor)
        assert outputs.numel() == sum(expected)
        assert list(tmp_path.iterdir()) == []
    else:
        ids = task.ids_of(providers.load_ours(tmp_path)(), -1)
        assert [found.ids for found in outputs] == [p + step for p, *steps in ids for step in steps]
