"""Unit "solution": whole solutions after the prompt, for DPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepdpo_kernels.data import LoadReport, load_step_pairs
from stepdpo_kernels.data.templates import end_of_answer
from stepdpo_kernels.types import StepDPOError, StepPair

Write = Callable[..., Path]

RECORD = {
    "prompt": "What is 2 + 2 + 3?",
    "initial_reason_steps": "Step 1: 2 + 2 = 4.\nStep 2:",
    "chosen": " 4 + 3 = 7.",
    "rejected": " 4 + 3 = 8.",
    "full_chosen": " 4 + 3 = 7.\nStep 3: The answer is 7.",
    "full_rejected": " 4 + 3 = 8.\nStep 3: The answer is 8.",
}
STEPS = RECORD["initial_reason_steps"]


def texts_of(tokenizer: Any, pair: StepPair) -> list[str]:
    """prefix, then prefix and branch for both branches"""
    sides: tuple[list[int], ...] = ([], pair.chosen_ids.tolist(), pair.rejected_ids.tolist())
    return [tokenizer.decode([*pair.prefix_ids.tolist(), *ids], skip_special_tokens=False) for ids in sides]


@pytest.mark.parametrize("boundary", ["joint", "separate"])
@pytest.mark.parametrize(
    ("template", "separator", "end"),
    [
        ("none", "", "</s>"),
        ("alpaca", "\n", "</s>"),
        ("deepseek-math", " ", "</s>"),
        ("qwen2-boxed", "", "<|im_end|>"),
        ("chat", "", "<|end|>"),
    ],
)
def test_a_branch_is_the_whole_solution_and_its_end(
    tiny_tokenizer: Any, write: Write, template: str, separator: str, end: str, boundary: str
) -> None:
    tokenizer, file = tiny_tokenizer("llama"), write("a.jsonl", RECORD)
    options = {"template": template, "boundary": boundary}
    (pair,) = load_step_pairs(file, tokenizer, unit="solution", **options)
    prompt, right, wrong = texts_of(tokenizer, pair)
    # The solutions begin after the prompt, and the text up to a step is that of unit "step".
    assert prompt == texts_of(tokenizer, load_step_pairs(file, tokenizer, **options)[0])[0].removesuffix(
        separator + STEPS
    )
    assert right == prompt + separator + STEPS + RECORD["full_chosen"] + end
    assert wrong == prompt + separator + STEPS + RECORD["full_rejected"] + end
    assert prompt.count("<s>") == 1
    if template != "qwen2-boxed":  # whose mark this tokenizer does not have
        last = tokenizer.convert_tokens_to_ids(end)
        for ids in (pair.chosen_ids.tolist(), pair.rejected_ids.tolist()):
            assert ids.index(last) == len(ids) - 1


def test_without_earlier_steps_there_is_no_separator(tiny_tokenizer: Any, write: Write) -> None:
    tokenizer = tiny_tokenizer("llama")
    file = write("a.jsonl", {**RECORD, "initial_reason_steps": "", "full_chosen": "It is 7.", "full_rejected": "8"})
    (pair,) = load_step_pairs(file, tokenizer, template="alpaca", unit="solution")
    prompt, right, wrong = texts_of(tokenizer, pair)
    assert prompt.endswith("### Response:")
    assert [right, wrong] == [prompt + "It is 7.</s>", prompt + "8</s>"]


def test_solutions_that_are_whole_already_or_have_their_end(tiny_tokenizer: Any, write: Write) -> None:
    tokenizer = tiny_tokenizer("llama")
    whole = {name: STEPS + RECORD[name] for name in ("full_chosen", "full_rejected")}
    ended = {name: RECORD[name] + "<|end|>" for name in ("full_chosen", "full_rejected")}
    fields: list[dict[str, Any]] = [{}, whole, ended, {"chosen": None, "rejected": 3}]  # nobody reads the steps
    pairs = load_step_pairs(
        write("a.jsonl", *[{**RECORD, **f, "id": i} for i, f in enumerate(fields)]), tokenizer, unit="solution"
    )
    assert len({(p.prefix_ids.tobytes(), p.chosen_ids.tobytes(), p.rejected_ids.tobytes()) for p in pairs}) == 1
    assert len(pairs) == 4


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("full_rejected", "", "''"),
        ("full_rejected", ..., "''"),
        ("full_chosen", None, "''"),
        ("full_chosen", " \n", r"' \\n'"),
        ("full_rejected", STEPS, "''"),
    ],
)
def test_records_without_a_solution_are_left_out(
    tiny_tokenizer: Any, write: Write, field: str, value: Any, shown: str
) -> None:
    bad = {name: v for name, v in {**RECORD, "id": "bad", field: value}.items() if v is not ...}
    file = write("a.jsonl", RECORD, bad)
    dataset = load_step_pairs(file, tiny_tokenizer(), unit="solution")
    assert dataset.report == LoadReport(
        str(file), ("a.jsonl",), 2, 1, {"empty_branch": 1}, {"empty_branch": ("a.jsonl, line 2 (id 'bad')",)}
    )
    with pytest.raises(
        StepDPOError,
        match=rf"a.jsonl, line 2 \(id 'bad'\): field '{field}' holds no solution: {shown}; write the solution or",
    ):
        load_step_pairs(file, tiny_tokenizer(), unit="solution", strict=True)
    assert len(load_step_pairs(file, tiny_tokenizer())) == 2


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"full_chosen": 7}, {}, r"a.jsonl, line 1: field 'full_chosen' must be a string, got int 7"),
        ({"prompt": None}, {}, "field 'prompt' must be a string, got null"),
        (
            {"initial_reason_steps": ...},
            {},
            "'initial_reason_steps' is missing; a record needs .*, full_chosen, full_r",
        ),
        (
            {"full_rejected": RECORD["full_chosen"]},
            {"strict": True},
            "fields 'full_chosen' and 'full_rejected' have the same tokens",
        ),
        (
            {"full_rejected": "8" * 90},
            {"strict": True, "max_length": 60, "template": "none"},
            r"too long: \d+ tokens before the solution and \d+ of 'full_rejected' '888.* exceed max_length 60",
        ),
        (
            {},
            {"strict": True, "max_tokens": 40, "template": "none"},
            r"too long: \d+ tokens before the solution, \d+ of 'full_chosen' and \d+ of 'full_rejected' exceed max_tok",
        ),
        ({}, {"unit": "answer"}, "unit must be one of step, solution; got 'answer'"),
    ],
)
def test_what_is_refused(
    tiny_tokenizer: Any, write: Write, fields: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    record = {name: value for name, value in {**RECORD, **fields}.items() if value is not ...}
    with pytest.raises(StepDPOError, match=message):
        load_step_pairs(write("a.jsonl", record), tiny_tokenizer(), **{"unit": "solution", **options})


def test_parquet_has_the_columns(tiny_tokenizer: Any, write: Write, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([RECORD]), tmp_path / "a.parquet")
    (pair,) = load_step_pairs(tmp_path / "a.parquet", tiny_tokenizer(), unit="solution")
    (line,) = load_step_pairs(write("a.jsonl", RECORD), tiny_tokenizer(), unit="solution")
    assert pair.chosen_ids.tolist() == line.chosen_ids.tolist()


# ---- what ends an answer --------------------------------------------------------------------------------------------


def test_the_end_is_what_the_chat_template_writes_first_after_the_answer(tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("llama")
    assert end_of_answer("chat", tokenizer) == "<|end|>"  # and not its line end, nor the tokenizer's EOS
    for template, end in (
        ("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['content'] | trim }}\n\n</s><|end|>{% endfor %}", "\n\n</s>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "</s>"),  # no mark: the EOS
        ("{{ messages[0]['content'] }}", "</s>"),  # no answer
    ):
        tokenizer.chat_template = template
        assert end_of_answer("chat", tokenizer) == end


@pytest.mark.parametrize(("name", "end"), [("smollm2", "<|im_end|>"), ("deepseek", "<｜end▁of▁sentence｜>")])
def test_the_end_of_real_tokenizers(name: str, end: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    if tokenizer.chat_template:
        assert end_of_answer("chat", tokenizer) == end
    assert end_of_answer("alpaca", tokenizer) == end
    assert len(tokenizer(end, add_special_tokens=False)["input_ids"]) == 1


def test_nothing_ends_an_answer(words: Any, write: Write) -> None:
    with pytest.raises(StepDPOError, match=r"unit 'solution' ends every solution, and .* has no EOS token .*eos_token"):
        load_step_pairs(write("a.jsonl", RECORD), words, template="none", unit="solution")
