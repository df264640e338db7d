"""lm-evaluation-harness reads the tasks of examples/lm_eval, asks as `stepdpo evaluate` does, and grades as it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.lm_eval import grading
from stepdpo_kernels.evaluation.tasks import TASKS

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"
GSM8K = {"question": "How many?", "answer": "It takes 2/2=<<2/2=1>>1 bolt.\n#### 1,001"}
MATH = {"problem": "Find $x$.", "level": "Level 2", "type": "Algebra", "solution": r"So $x=\boxed{\frac{1}{2}}$."}


def load_yaml(name: str) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((FOLDER / name).read_text(), Loader)


@pytest.mark.parametrize(("file", "task"), [("stepdpo_gsm8k.yaml", "gsm8k"), ("stepdpo_math.yaml", "math")])
def test_tasks_are_those_of_the_command(file, task):
    config = load_yaml(file)
    ours = TASKS[task]
    parts = config["task"] if "group" in config else [config]
    assert tuple(f"{part['dataset_path']}:{part['dataset_name']}" for part in parts) == ours.sources
    for part in parts:
        assert part["gen_prefix"] == ours.beginning == grading.BEGINNING
        assert part["test_split"] == ours.split
        assert part["generation_kwargs"]["max_gen_toks"] == ours.max_new_tokens
        assert (part["generation_kwargs"]["do_sample"], part["generation_kwargs"]["temperature"]) == (False, 0)
        for field in ("doc_to_target", "process_results"):
            module, _, name = part[field].rpartition(".")
            assert module == "grading"
            assert callable(getattr(grading, name))


@pytest.mark.parametrize(
    ("grade", "doc", "text", "found"),
    [
        (grading.grade_gsm8k, GSM8K, " 500 + 501.\nStep 2: The answer is 1001.", (1, 0)),
        (grading.grade_gsm8k, GSM8K, " The answer is 1.", (0, 0)),
        (grading.grade_gsm8k, GSM8K, " I do not know.", (0, 1)),
        (grading.grade_math, MATH, r" So $x=\boxed{0.5}$.", (1, 0)),
        (grading.grade_math, MATH, r" So $x=\boxed{2}$.", (0, 0)),
    ],
)
def test_grading(grade, doc, text, found):
    assert grade(doc, [text]) == {"acc": found[0], "no_answer": found[1]}


def test_a_solution_without_an_answer_is_named():
    with pytest.raises(ValueError, match="field 'solution' has no answer: 'None at all'"):
        grading.math_answer({"solution": "None at all"})


def test_the_harness_loads_gsm8k(tmp_path):
    """From a local file, as the README shows."""
    tasks = pytest.importorskip("lm_eval.tasks")
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps(GSM8K) + "\n")
    (tmp_path / "local.yaml").write_text(
        f"include: {FOLDER / 'stepdpo_gsm8k.yaml'}\ntask: local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    )
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load(["local"])["tasks"]["local"]
    check(task, GSM8K, "How many?", "1,001", " The answer is 1001.")


def test_the_harness_loads_math(monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    import datasets

    asked = []

    def load_dataset(path: str, name: str, **_: Any) -> datasets.DatasetDict:
        asked.append(f"{path}:{name}")
        return datasets.DatasetDict(test=datasets.Dataset.from_list([MATH]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manager = tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert manager.all_groups == ["stepdpo_math"]
    loaded = manager.load(["stepdpo_math"])["tasks"]
    assert tuple(asked) == TASKS["math"].sources
    assert len(loaded) == 7
    for task in loaded.values():
        check(task, MATH, "Find $x$.", r"\frac{1}{2}", r" \boxed{1/2}")


def check(task: Any, doc: dict[str, Any], problem: str, answer: str, right: str) -> None:
    """What a loaded task asks, with and without a chat template, and how it grades."""
    prefix = {"num_fewshot": 0, "gen_prefix": task.doc_to_prefix(doc)}
    assert task.fewshot_context(doc, **prefix) == f"{problem}\n{grading.BEGINNING}"

    def template(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        assert not add_generation_prompt  # the answer has begun
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    chat = task.fewshot_context(doc, **prefix, apply_chat_template=True, chat_template=template)
    assert chat == f"<user>{problem}<assistant>{grading.BEGINNING}"
    assert task.doc_to_target(doc) == answer
    assert task.process_results(doc, [right]) == {"acc": 1.0, "no_answer": 0.0}
    assert task.config.generation_kwargs["max_gen_toks"] == 2048
    assert set(task.aggregation()) == {"acc", "no_answer"}
    task.build_all_requests(limit=1, rank=0, world_size=1)
    (request,) = task.instances
    assert request.arguments[0] == f"{problem}\n{grading.BEGINNING}"
