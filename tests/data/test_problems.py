"""Problems are read from the files that people have, and what is wrong with one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stepdpo_kernels.data.problems import Problem, parse_problem, read_problems
from stepdpo_kernels.data.records import RawRecord
from stepdpo_kernels.types import StepDPOError


def parsed(value: Any, format: str | None = None) -> Problem:
    return parse_problem(RawRecord("file.jsonl, line 3", "file.jsonl:3", value), format)


GSM8K = {"question": "How many?", "answer": "It takes 2/2=<<2/2=1>>1 bolt.\nSo 2+1=<<2+1=3>>3\n#### 3"}
MATH = {"problem": "Find $x$.", "level": "Level 2", "type": "Algebra", "solution": r"So $x=\boxed{\frac{1}{2}}$."}
AQUA = {"question": "Which?", "options": ["A)21", "B)21.5", "C) 22"], "rationale": "Because.", "correct": "C"}
ODYSSEY = {
    "Problem_7": {
        "question": "Find it: \\underline{\\hspace{2cm}}.\n\t\n\\end{problem}\n\\noindent",
        "answer": "100!\\\\\n\\noindent",
        "reasoning": "It is so.",
        "label": "Algebra",
        "level": "high school competition",
    }
}


@pytest.mark.parametrize(
    ("value", "format", "problem"),
    [
        (GSM8K, "gsm8k", Problem("file.jsonl:3", "How many?", "3", "It takes 2/2=1 bolt.\nSo 2+1=3")),
        (
            MATH,
            "math",
            Problem("file.jsonl:3", "Find $x$.", r"\frac{1}{2}", MATH["solution"], "Algebra", "Level 2"),
        ),
        (
            MATH | {"answer": "0.5", "unique_id": "test/algebra/1.json", "subject": "Prealgebra", "level": 2},
            "math",
            Problem("test/algebra/1.json", "Find $x$.", "0.5", MATH["solution"], "Prealgebra", "2"),
        ),
        (
            AQUA,
            "aqua",
            Problem(
                "file.jsonl:3",
                "Which?\nAnswer with the letter of one of these choices:\n(A) 21\n(B) 21.5\n(C) 22",
                "C",
                "Because.",
            ),
        ),
        (
            {"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 204},
            "aime",
            Problem("2024-I-1", "P", "204", "S"),
        ),
        (
            ODYSSEY,
            "odyssey",
            Problem(
                "Problem_7",
                "Find it: \\underline{\\hspace{2cm}}.",
                "100!",
                "It is so.",
                "Algebra",
                "high school competition",
            ),
        ),
        ({"id": 5, "prompt": "P", "answer": " 7 "}, "plain", Problem("5", "P", "7")),
        ({"problem": "P", "solution": "S", "answer": "7"}, "plain", Problem("file.jsonl:3", "P", "7", "S")),
    ],
)
def test_formats(value, format, problem):
    assert parsed(value) == problem
    assert parsed(value, format) == problem


@pytest.mark.parametrize(
    ("value", "format", "said"),
    [
        ([1], None, "a record must be an object"),
        ({"answer": "7"}, None, "field 'prompt' is missing; this record has answer"),
        ({"prompt": "", "answer": "7"}, None, "field 'prompt' is empty"),
        ({"prompt": "P", "answer": "  "}, None, "field 'answer' is empty"),
        ({"prompt": "P", "answer": None}, None, "field 'answer' is missing"),
        ({"prompt": "P", "answer": ["7"]}, None, "field 'answer' must be a string, got"),
        ({"prompt": "P", "answer": True}, None, "field 'answer' must be a string, got True"),
        ({"prompt": "P", "answer": float("nan")}, None, "field 'answer' must be a string, got nan"),
        ({"prompt": "half \ud800", "answer": "7"}, None, "half of a surrogate pair"),
        ({"question": "P", "answer": "no mark"}, "gsm8k", "no answer after ####"),
        ({"question": "P", "answer": "empty ####  "}, None, "no answer after ####"),
        ({"problem": "P", "solution": "no box"}, None, r"no answer in \\boxed"),
        (AQUA | {"correct": "E"}, None, "field 'correct' is 'E', but the options are"),
        (AQUA | {"options": "A)21"}, None, "field 'options' must be a list"),
        ({"Problem_1": {"question": "P", "answer": "\\\\\n\\noindent"}}, None, "field 'answer' is empty"),
        ({"prompt": "P", "answer": "7"}, "gsm9k", "format must be one of"),
    ],
)
def test_what_is_wrong_is_named(value, format, said):
    with pytest.raises(StepDPOError, match=said) as error:
        parsed(value, format)
    assert "line 3" in str(error.value) or format == "gsm9k"


def test_parquet_and_gzip_keep_all_fields(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    table = pyarrow.Table.from_pylist([GSM8K, {"question": "And?", "answer": "#### 4"}])
    parquet.write_table(table, tmp_path / "test.parquet")
    (tmp_path / "test.jsonl").write_text(json.dumps(GSM8K) + "\n")
    assert [problem.answer for problem in read_problems(tmp_path / "test.parquet")] == ["3", "4"]
    assert [problem.answer for problem in read_problems(tmp_path)] == ["3", "3", "4"]


def test_gsm8k_as_it_is_distributed(shared_data):
    problems = list(read_problems(shared_data / "gsm8k_test.jsonl"))
    assert len(problems) == 1319
    assert len({problem.id for problem in problems}) == 1319
    assert all(problem.reference and "<<" not in problem.reference for problem in problems)
    assert problems[0].answer == "18"
