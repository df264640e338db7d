"""Step pairs come in from other formats and go out to them without a change of meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.data.exporters import export_pairs
from stepdpo_kernels.data.importers import import_pairs
from stepdpo_kernels.data.steps import StepFormat
from stepdpo_kernels.types import StepDPOError


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def imported(tmp_path: Path, records: list[Any], format: str, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    source = write(tmp_path / "theirs.jsonl", records)
    report = import_pairs(source, tmp_path / "pairs.jsonl", format, overwrite=True, **options)
    return report, lines(tmp_path / "pairs.jsonl")


# ---- PRM800K ------------------------------------------------------------------------------------------------------


def completion(text: str, rating: int | None, flagged: bool | None = None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*completions: dict[str, Any], chosen: int | None = 0, human: Any = None) -> dict[str, Any]:
    return {"completions": list(completions), "human_completion": human, "chosen_completion": chosen}


def row(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    question = {"problem": "What is 1 + 2 + 4?", "ground_truth_answer": "7"}
    label = {"steps": list(steps), "finish_reason": changes.pop("finish_reason", "solution")}
    return {"question": question, "label": label, "is_quality_control_question": False} | changes


def test_prm800k(tmp_path):
    first = step(completion("We add.", 0), completion("We guess.", -1))
    second = step(completion("1 + 2 = 4.", -1), completion(" 1 + 2 = 3. ", 1), completion("3.", 1), chosen=1)
    third = step(completion("3 + 4 = 8.", -1), chosen=None)
    report, records = imported(tmp_path, [row(first, second, third)], "prm800k")
    assert [(r["step_index"], r["chosen"], r["rejected"]) for r in records] == [
        (2, " 1 + 2 = 3.", " 1 + 2 = 4."),
        (2, " 3.", " 1 + 2 = 4."),
    ]
    assert records[0] == {
        "dataset": "prm800k",
        "id": "theirs.jsonl:1/0",
        "prompt": "What is 1 + 2 + 4?",
        "initial_reason_steps": "Let's think step by step.\nStep 1: We add.\nStep 2:",
        "chosen": " 1 + 2 = 3.",
        "rejected": " 1 + 2 = 4.",
        "full_chosen": "",
        "full_rejected": "",
        "answer": "7",
        "step_index": 2,
        "chosen_logp": None,
        "rejected_logp": None,
    }
    assert report.written == 2
    assert len(imported(tmp_path, [row(first, second, third)], "prm800k", max_pairs=1)[1]) == 1


@pytest.mark.parametrize("human", ["1 + 2 = 3.", {"text": "1 + 2 = 3.", "rating": None}])
def test_a_step_that_the_labeler_wrote_is_right_and_goes_on(tmp_path, human):
    first = step(completion("1 + 2 = 4.", -1), chosen=None, human=human)
    second = step(completion("3 + 4 = 8.", -1), completion("3 + 4 = 7.", 1), chosen=1)
    _, records = imported(tmp_path, [row(first, second)], "prm800k")
    assert [(r["chosen"], r["rejected"]) for r in records] == [
        (" 1 + 2 = 3.", " 1 + 2 = 4."),
        (" 3 + 4 = 7.", " 3 + 4 = 8."),
    ]
    assert records[1]["initial_reason_steps"] == "Let's think step by step.\nStep 1: 1 + 2 = 3.\nStep 2:"


def test_what_prm800k_leaves_out(tmp_path):
    good, bad = completion("right", 1), completion("wrong", -1)
    rows = [
        row(step(good, bad), is_quality_control_question=True),
        row(step(good, bad), is_initial_screening_question=True),
        row(step(good, bad), finish_reason="bad_problem"),
        row(step(good, completion("flagged", -1, True)), step(good)),
        row(step(bad, chosen=0), step(good, bad)),  # after a wrong step nothing is right
        row(step(good, completion("neutral", 0), completion("unrated", None))),
    ]
    report, records = imported(tmp_path, rows, "prm800k")
    assert records == []
    assert report.counts == {"rows for quality control": 2, "broken problems": 1, "rows without a pair": 3}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"label": {"steps": []}}, "field 'question' must hold a 'problem'"),
        (row() | {"label": {"steps": 5}}, "field 'label' must hold a list 'steps'"),
        (row(step({"rating": 1})), "step 1: a completion must hold a 'text'"),
        (row(step(completion("a", 1), chosen=3)), "step 1: field 'chosen_completion' is 3"),
        (row(5), "step 1: must hold a list 'completions', got 5"),
        (row({"completions": 5}), "step 1: must hold a list 'completions', got"),
    ],
)
def test_broken_rows_of_prm800k(tmp_path, bad, said):
    with pytest.raises(StepDPOError, match=f"line 1: {said}"):
        imported(tmp_path, [bad], "prm800k")
    report, _ = imported(tmp_path, [bad, row()], "prm800k", on_bad="skip")
    assert report.skipped == {"unreadable": 1}


# ---- Math-Step-DPO-10K --------------------------------------------------------------------------------------------

RELEASED = {
    "dataset": "MATH_Rephrased",
    "prompt": "What is 1 + 2 + 4?",
    "initial_reason_steps": "Let's think step by step.\nStep 1: 1 + 2 = 3.\nStep 2:",
    "chosen": " 3 + 4 = 7.",
    "rejected": " 3 + 4 = 8.",
    "full_chosen": " 3 + 4 = 7.\nThe answer is: 7",
    "full_rejected": " 3 + 4 = 8.\nThe answer is: 8",
    "answer": "7",
}


def test_a_regular_row_stays_as_it_is(tmp_path):
    report, (record,) = imported(tmp_path, [RELEASED], "step-dpo")
    assert record == RELEASED | {
        "id": "theirs.jsonl:1", "step_index": 2, "chosen_logp": None, "rejected_logp": None,
    }  # fmt: skip
    assert report.counts == {}


@pytest.mark.parametrize(
    "change",
    [
        {"initial_reason_steps": "Let's see.\nStep 1: as in Step 1: of before.\nStep 2:"},
        {"initial_reason_steps": "Let's see.\n  Step 1: 1 + 2 = 3.\n  Step 2:"},
        {"id": 0, "group": "", "weight": 0.0, "chosen_logp": 0.0, "rejected_logp": -1.5},
    ],
)
def test_what_a_row_holds_is_not_lost(tmp_path, change):
    report, (record,) = imported(tmp_path, [RELEASED | change], "step-dpo")
    assert record == record | RELEASED | {"step_index": 2} | change
    assert report.counts == {}


def test_answers_that_are_no_text(tmp_path):
    for answer, text in ((0, "0"), (None, ""), (2.5, "2.5")):
        _, (record,) = imported(tmp_path, [RELEASED | {"answer": answer}], "step-dpo")
        assert record["answer"] == text
        theirs = {"prompt": "P", "chosen": CHOSEN, "rejected": REJECTED, "answer": answer}
        _, (record,) = imported(tmp_path, [theirs], "preference")
        assert record["answer"] == text


def test_a_whole_solution_that_is_no_text(tmp_path):
    with pytest.raises(StepDPOError, match="line 1: field 'full_rejected' must be a string, got int 5"):
        imported(tmp_path, [RELEASED | {"full_rejected": 5}], "step-dpo")


@pytest.mark.parametrize(
    ("change", "becomes", "counted"),
    [
        (
            {"initial_reason_steps": "Let's think step by step. Step 1:"},
            {"initial_reason_steps": "Let's think step by step.\nStep 1:", "step_index": 1},
            "no line break before Step 1",
        ),
        (
            {"initial_reason_steps": "Let's think step by step.\nStep 1: 1 + 2 = 3.\nStep 3:"},
            {"step_index": 2},
            "misnumbered markers",
        ),
        ({"full_rejected": ""}, {}, "no full_rejected"),
        ({"full_rejected": None}, {"full_rejected": ""}, "no full_rejected"),
        ({"chosen": "3 + 4 = 7."}, {"chosen": " 3 + 4 = 7."}, "steps without a space before them"),
        (
            {"full_chosen": RELEASED["initial_reason_steps"] + RELEASED["full_chosen"]},
            {"full_chosen": RELEASED["full_chosen"]},
            "solutions with the initial steps",
        ),
        ({"initial_reason_steps": "We begin. "}, {"step_index": 0}, "no marker at the end of the steps"),
    ],
)
def test_irregular_rows_are_mended_and_counted(tmp_path, change, becomes, counted):
    report, (record,) = imported(tmp_path, [RELEASED | change], "step-dpo")
    kept = {name: value for name, value in (RELEASED | change | becomes).items() if name in record}
    assert {name: record[name] for name in kept} == kept
    assert report.counts == {counted: 1}


# ---- preferences --------------------------------------------------------------------------------------------------

CHOSEN = "Step 1: 1 + 2 = 3.\nStep 2: 3 + 4 = 7.\nStep 3: It is 7."
REJECTED = "Step 1: 1 + 2 = 3.\nStep 2: 3 + 4 = 8.\nStep 3: It is 8."


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "P", "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": said("user", "P"), "chosen": said("assistant", CHOSEN), "rejected": said("assistant", REJECTED)},
        {
            "chosen": said("user", "P") + said("assistant", CHOSEN),
            "rejected": said("user", "P") + said("assistant", REJECTED),
        },
    ],
)
def test_preferences_of_every_form(tmp_path, record):
    _, (pair,) = imported(tmp_path, [record], "preference")
    assert (pair["prompt"], pair["step_index"]) == ("P", 2)
    assert pair["initial_reason_steps"] == "Step 1: 1 + 2 = 3.\nStep 2:"
    assert (pair["chosen"], pair["rejected"]) == (" 3 + 4 = 7.", " 3 + 4 = 8.")
    assert pair["full_chosen"] == " 3 + 4 = 7.\nStep 3: It is 7."


def test_preferences_by_lines(tmp_path):
    record = {"prompt": "P", "chosen": "a\nb\nc", "rejected": "a\nx"}
    _, (pair,) = imported(tmp_path, [record], "preference", steps=StepFormat("lines"))
    assert (pair["initial_reason_steps"], pair["chosen"], pair["rejected"]) == ("a\n", "b", "x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": CHOSEN}, "the same answers"),
        ({"rejected": "no steps"}, "answers without two steps to compare"),
        ({"rejected": "Step 1: 1 + 2 = 3."}, "answers without two steps to compare"),
        ({"rejected": "Hm. " + REJECTED}, "answers without two steps to compare"),
        ({"rejected": REJECTED.replace("\nStep 2:", "\n\nStep 2:")}, "steps that begin with different markers"),
        (
            {
                "prompt": said("system", "S") + said("user", "P"),
                "chosen": said("assistant", CHOSEN),
                "rejected": said("assistant", REJECTED),
            },
            "conversations of other than a question and an answer",
        ),
    ],
)
def test_preferences_that_hold_no_step_pair_are_counted(tmp_path, change, reason):
    report, records = imported(
        tmp_path, [{"prompt": "P", "chosen": CHOSEN, "rejected": REJECTED} | change], "preference"
    )
    assert (records, report.counts) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "P", "chosen": CHOSEN}, "field 'rejected' must be text or messages, got None"),
        ({"chosen": CHOSEN, "rejected": REJECTED}, "field 'prompt' must be text beside text"),
        ({"prompt": 5, "chosen": said("assistant", CHOSEN), "rejected": REJECTED}, "field 'prompt' must be text or"),
        ({"prompt": "P", "chosen": [5], "rejected": [5]}, "a message must hold 'role' and 'content', got 5"),
    ],
)
def test_broken_preferences(tmp_path, bad, words):
    with pytest.raises(StepDPOError, match=words):
        imported(tmp_path, [bad], "preference")


# ---- there and back -----------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() and "tep" not in text and text.strip() == text
)


@settings(max_examples=30)
@given(prompt=words, earlier=st.lists(words, max_size=3), chosen=words, rejected=words)
def test_out_to_trl_and_back(tmp_path_factory, prompt, earlier, chosen, rejected):
    if chosen == rejected:
        return
    folder = tmp_path_factory.mktemp("convert")
    before = "".join(f"\nStep {i}: {text}" for i, text in enumerate(earlier, 1)) + f"\nStep {len(earlier) + 1}:"
    record = {
        "id": "a", "group": "g", "prompt": prompt, "initial_reason_steps": "Let's think." + before,
        "chosen": f" {chosen}", "rejected": f" {rejected}",
    }  # fmt: skip
    write(folder / "ours.jsonl", [record])
    export_pairs(folder / "ours.jsonl", folder / "trl.jsonl", "trl")
    import_pairs(folder / "trl.jsonl", folder / "again.jsonl", "preference")
    (again,) = lines(folder / "again.jsonl")
    names = ("prompt", "initial_reason_steps", "chosen", "rejected")
    assert {name: again[name] for name in names} == {name: record[name] for name in names}


def test_exports(tmp_path):
    source = write(tmp_path / "ours.jsonl", [RELEASED | {"id": "a", "group": "g"}])
    export_pairs(source, tmp_path / "text.jsonl", "trl-text", template="alpaca")
    (text,) = lines(tmp_path / "text.jsonl")
    assert text["prompt"].endswith("### Response:\nLet's think step by step.\nStep 1: 1 + 2 = 3.\nStep 2:")
    assert (text["chosen"], text["rejected"], text["id"]) == (" 3 + 4 = 7.", " 3 + 4 = 8.", "a")
    export_pairs(source, tmp_path / "factory.jsonl", "llama-factory")
    (factory,) = lines(tmp_path / "factory.jsonl")
    whole = RELEASED["initial_reason_steps"] + RELEASED["chosen"]
    assert factory["conversations"] == [{"from": "human", "value": RELEASED["prompt"]}]
    assert factory["chosen"] == {"from": "gpt", "value": whole}
    info = json.loads((tmp_path / "factory.jsonl.dataset_info.json").read_text())
    assert info["factory"] == {
        "file_name": "factory.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }


def test_imported_pairs_load(tmp_path, tiny_tokenizer):
    imported(tmp_path, [{"prompt": "P", "chosen": CHOSEN, "rejected": REJECTED}], "preference")
    (pair,) = load_step_pairs(tmp_path / "pairs.jsonl", tiny_tokenizer("qwen2"))
    assert pair.id == "theirs.jsonl:1/0"


@pytest.mark.parametrize(
    ("call", "words_of_error"),
    [
        (
            lambda path: import_pairs(path, path, "csv"),
            "format must be one of prm800k, step-dpo, preference; got",
        ),
        (lambda path: import_pairs(path, path, "prm800k", max_pairs=0), "max_pairs must be at least 1, got 0"),
        (lambda path: export_pairs(path, path, "csv"), "format must be one of trl, trl-text, llama-factory; got 'csv'"),
        (lambda path: export_pairs(path, path, "trl", template="chat"), "template must be one of alpaca"),
    ],
)
def test_options_are_checked(tmp_path, call, words_of_error):
    with pytest.raises(StepDPOError, match=words_of_error):
        call(tmp_path / "x.jsonl")
