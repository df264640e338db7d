"""From records to pairs: defaults, what is refused, what is left out and how that is reported."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepdpo_kernels
from stepdpo_kernels.data import LoadReport, load_step_pairs
from stepdpo_kernels.types import StepDPOError, StepPair

Write = Callable[..., Path]
Record = Callable[..., dict[str, Any]]


def pair(prefix: list[int], chosen: list[int], rejected: list[int], **fields: Any) -> StepPair:
    prefix_ids, chosen_ids, rejected_ids = (np.array(ids, dtype=np.int32) for ids in (prefix, chosen, rejected))
    return StepPair(prefix_ids, chosen_ids, rejected_ids, **fields)


def test_pairs_hold_the_tokens_of_the_record(words: Any, write: Write, record: Record):
    file = write("a.jsonl", record(), record(id=3, group="g", weight=2), record(prompt="w9", initial_reason_steps=""))
    first, second, third = load_step_pairs(file, words, template="none")
    assert first == pair([2, 3, 4], [5, 6], [7, 8, 9], id="a.jsonl:1", group=first.group)
    assert second == pair([2, 3, 4], [5, 6], [7, 8, 9], id="3", group="g", weight=2.0)
    assert third == pair([10], [5, 6], [7, 8, 9], id="a.jsonl:3", group=third.group)
    assert first.group
    assert first.group != third.group


def test_pairs_of_one_prompt_share_a_group(tiny_tokenizer: Any, write: Write, step_records: Any):
    records = step_records(problems=3, pairs=4)
    dataset = load_step_pairs(write("a.jsonl", *records), tiny_tokenizer())
    groups = {record["prompt"]: pair.group for record, pair in zip(records, dataset, strict=True)}
    assert Counter(pair.group for pair in dataset) == dict.fromkeys(groups.values(), 4)
    assert len(set(groups.values())) == 3


def test_public_name(words: Any):
    assert stepdpo_kernels.load_step_pairs is load_step_pairs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ...}, r"a.jsonl, line 2: field 'prompt' is missing; .* this one has initial_reason_steps, chosen,"),
        ({"id": "q", "rejected": ...}, r"a.jsonl, line 2 \(id 'q'\): field 'rejected' is missing"),
        ({"initial_reason_steps": ...}, r"line 2: field 'initial_reason_steps' is missing"),
        ({"chosen": 42}, r"a.jsonl, line 2: field 'chosen' must be a string, got int 42"),
        ({"id": 5, "chosen": ["w1"]}, r"a.jsonl, line 2 \(id 5\): field 'chosen' must be a string, got list \['w1'\]"),
        ({"prompt": None}, r"a.jsonl, line 2: field 'prompt' must be a string, got null"),
        ({"rejected": {"a": "x" * 900}}, r"field 'rejected' must be a string, got dict \{'a': 'x{100,160}\.\.\.$"),
        ({"chosen": "w1 \ud83d w2"}, r"line 2: field 'chosen' holds half of a surrogate pair at character 3,"),
        ({"id": 1.5}, r"a.jsonl, line 2: field 'id' must be a string or an integer, got float 1.5"),
        ({"id": True}, r"a.jsonl, line 2: field 'id' must be a string or an integer, got bool True"),
        ({"group": 4}, r"a.jsonl, line 2: field 'group' must be a string, got int 4"),
        ({"weight": "2"}, r"a.jsonl, line 2: field 'weight' must be a number, got str '2'"),
        ({"weight": False}, r"a.jsonl, line 2: field 'weight' must be a number, got bool False"),
        ({"weight": -1}, r"a.jsonl, line 2: field 'weight' must be finite and at least 0, got -1"),
        ({"weight": float("nan")}, r"a.jsonl, line 2: field 'weight' must be finite and at least 0, got nan"),
        ({"weight": 10**400}, r"a.jsonl, line 2: field 'weight' must be finite and at least 0, got 10000"),
        ({"id": "a.jsonl:1"}, r"a.jsonl, line 2: field 'id': 'a.jsonl:1' is the id of a.jsonl, line 1 already"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_malformed_record_is_never_skipped(
    words: Any, write: Write, record: Record, fields: dict[str, Any], message: str, strict: bool
):
    with pytest.raises(StepDPOError, match=message):
        load_step_pairs(write("a.jsonl", record(), record(**fields)), words, strict=strict)


def test_ids_that_come_twice(tmp_path: Path, words: Any, write: Write, record: Record):
    with pytest.raises(
        StepDPOError, match=r"a.jsonl, line 3: field 'id': '7' is the id of a.jsonl, line 1 already; give"
    ):
        load_step_pairs(write("a.jsonl", record(id=7), record(), record(id="7")), words)
    write("d/a.jsonl", record(id="x"))
    write("d/b.jsonl", record(id="x"))
    with pytest.raises(StepDPOError, match=r"b.jsonl, line 1: field 'id': 'x' is the id of a.jsonl, line 1 already"):
        load_step_pairs(tmp_path / "d", words)


UNFIT = [
    pytest.param("empty_branch", {"chosen": ""}, r"field 'chosen' holds no step: ''; write the step or", id="empty"),
    pytest.param("empty_branch", {"rejected": " \n"}, r"field 'rejected' holds no step: ' \\n'", id="blank"),
    pytest.param(
        "identical_branches",
        {"chosen": " w4 w5", "rejected": "  w4  w5"},
        r"fields 'chosen' and 'rejected' have the same tokens: ' w4 w5'; remove the record",
        id="identical",
    ),
    pytest.param(
        "too_long",
        {"rejected": " w1" * 8},
        r"too long: 3 tokens before the step and 8 of 'rejected' ' w1.*' exceed max_length 10; raise max_length to 11",
        id="branch",
    ),
    pytest.param(
        "too_long",
        {"prompt": "w1 " * 8},
        r"too long: 9 tokens before the step and 3 of 'rejected' .* exceed max_length 10; raise max_length to 12",
        id="prompt",
    ),
    pytest.param(
        "too_long",
        {"chosen": " w1" * 7, "rejected": " w2" * 6},
        r"too long: 3 tokens before .*, 7 of 'chosen' and 6 of 'rejected' exceed max_tokens 15.*raise max_tokens to 16",
        id="both",
    ),
]


@pytest.mark.parametrize(("reason", "fields", "message"), UNFIT)
def test_what_does_not_fit_is_counted_and_named(
    words: Any,
    write: Write,
    record: Record,
    caplog: pytest.LogCaptureFixture,
    reason: str,
    fields: dict[str, Any],
    message: str,
):
    file = write("a.jsonl", record(), record(id="bad", **fields), record())
    options: dict[str, Any] = {"template": "none", "max_length": 10, "max_tokens": 15}
    with caplog.at_level(logging.INFO, logger="stepdpo_kernels"):
        dataset = load_step_pairs(file, words, **options)
    assert [pair.id for pair in dataset] == ["a.jsonl:1", "a.jsonl:3"]
    assert dataset.report == LoadReport(
        source=str(file),
        files=("a.jsonl",),
        records=3,
        kept=2,
        dropped={reason: 1},
        first={reason: ("a.jsonl, line 2 (id 'bad')",)},
    )
    (logged,) = caplog.records
    assert logged.levelno == logging.WARNING
    assert f"3 records, 2 kept; 1 left out as {reason}: a.jsonl, line 2 (id 'bad')" in logged.getMessage()

    with pytest.raises(StepDPOError, match=r"a.jsonl, line 2 \(id 'bad'\): " + message):
        load_step_pairs(file, words, **options, strict=True)
    with pytest.raises(StepDPOError, match=f"no record can be used: .*: 1 records, 0 kept; 1 left out as {reason}: "):
        load_step_pairs(write("b.jsonl", record(**fields)), words, **options)


def test_limits_are_inclusive_and_can_be_lifted(words: Any, write: Write, record: Record):
    file = write("a.jsonl", record(prompt="w1 " * 1100))
    with pytest.raises(StepDPOError, match="1 left out as too_long"):
        load_step_pairs(file, words, template="none")
    assert len(load_step_pairs(file, words, template="none", max_length=None)) == 1
    assert len(load_step_pairs(file, words, template="none", max_length=1104, max_tokens=1106)) == 1
    for limits in ({"max_length": 1103}, {"max_length": None, "max_tokens": 1105}):
        with pytest.raises(StepDPOError, match="1 left out as too_long"):
            load_step_pairs(file, words, template="none", **limits)


def test_a_step_whose_characters_make_no_tokens_is_empty(words: Any, write: Write, record: Record):
    class Deaf:
        """Drops U+0007, as tokenizers drop characters that their vocabulary lacks."""

        def __getattr__(self, name: str) -> Any:
            return getattr(words, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return words([text.replace("\a", "") for text in texts], **options)

    file = write("a.jsonl", record(chosen=" \a"), record())
    for boundary in ("joint", "separate"):
        dataset = load_step_pairs(file, Deaf(), boundary=boundary)
        assert dataset.report.dropped == {"empty_branch": 1}


def test_the_report_is_bounded(words: Any, write: Write, record: Record):
    dataset = load_step_pairs(write("a.jsonl", *[record(chosen="")] * 50, record(), record(chosen=" w6 w7 w8")), words)
    assert dataset.report.dropped == {"empty_branch": 50, "identical_branches": 1}
    assert len(dataset.report.first["empty_branch"]) == 20
    assert str(dataset.report).endswith(
        "a.jsonl: 52 records, 1 kept; 50 left out as empty_branch: a.jsonl, line 1 (id 'a.jsonl:1'), a.jsonl, line 2 "
        "(id 'a.jsonl:2'), a.jsonl, line 3 (id 'a.jsonl:3'), ...; 1 left out as identical_branches: a.jsonl, line 52 "
        "(id 'a.jsonl:52')"
    )


def test_nothing_before_the_step(words: Any, write: Write, record: Record, byte_level: Any):
    file = write("a.jsonl", record(prompt="", initial_reason_steps=""))
    with pytest.raises(StepDPOError, match=r"a.jsonl, line 1 .*: no token lies before the step.*field 'prompt' is ''"):
        load_step_pairs(file, words, template="none")
    (pair,) = load_step_pairs(file, byte_level(), template="none")
    assert pair.prefix_ids.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_tokens": -5}, "max_tokens must be at least 2, got -5"),
        (
            {"template": "vicuna"},
            "template must be one of chat, alpaca, deepseek-math, qwen2-boxed, none; got 'vicuna'",
        ),
        ({"boundary": "both"}, "boundary must be one of joint, separate; got 'both'"),
    ],
)
def test_bad_options(words: Any, write: Write, record: Record, options: dict[str, Any], message: str):
    with pytest.raises(StepDPOError, match=message):
        load_step_pairs(write("a.jsonl", record()), words, **options)


def test_texts_are_kept_as_they_are(byte_level: Any, write: Write, record: Record):
    texts = {"prompt": " Q\n", "initial_reason_steps": "\nStep 1:  ", "chosen": "  We ", "rejected": "We\n\n"}
    (pair,) = load_step_pairs(write("a.jsonl", record(**texts)), byte_level(), template="none")
    for step, branch in ((texts["chosen"], pair.chosen_ids), (texts["rejected"], pair.rejected_ids)):
        ids = [*pair.prefix_ids.tolist(), *branch.tolist()]
        assert byte_level().decode(ids) == "<s> Q\n\nStep 1:  " + step


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_real_pairs(shared_data: Path, smollm2: Any, template: str):
    file = shared_data / "gsm8k_step_pairs.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    dataset = load_step_pairs(file, smollm2, template=template)
    assert dataset.report.records == len(records) == len(dataset) + sum(dataset.report.dropped.values())
    assert len({pair.group for pair in dataset}) == len({record["prompt"] for record in records})
    for pair in dataset:
        record = records[int(pair.id.rpartition(":")[2]) - 1]
        for field in ("chosen", "rejected"):
            text = smollm2.decode([*pair.prefix_ids.tolist(), *getattr(pair, f"{field}_ids").tolist()])
            assert text.endswith(record["initial_reason_steps"] + record[field])


def test_importing_and_reading_needs_neither_transformers_nor_datasets():
    code = (
        "import sys, stepdpo_kernels.data\n"
        "heavy = {'transformers', 'datasets', 'pyarrow', 'pandas', 'tokenizers', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
