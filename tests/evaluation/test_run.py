"""A run asks every problem once, grades what comes back, and goes on where it was stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepdpo_kernels.answers import AnswerChecker
from stepdpo_kernels.data.generation import Completion, Sampling
from stepdpo_kernels.data.pipeline.stage import run_file
from stepdpo_kernels.evaluation.metrics import summarise
from stepdpo_kernels.evaluation.run import ITEMS_FILE, evaluate, graded_samples, read_items, read_settings
from stepdpo_kernels.evaluation.tasks import TASKS, find_task
from stepdpo_kernels.types import StepDPOError
from tests.evaluation.scripted import Scripted, answer_of, sums, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(temperature=0, max_new_tokens=100)
BEGINNING = "Let's think step by step.\nStep 1:"


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "sums.jsonl", sums(13))


def mostly_right(problem: str, sample: int) -> str | Completion:
    """Items 0, 5, 10 wrong, 3 cut off, 4 without an answer."""
    i = answer_of(problem) // 2
    if i == 3:
        return Completion(f" so it is \\boxed{{{2 * i}}} and then and then", "length")
    if i == 4:
        return " I do not know."
    return f" double it.\nStep 2: The answer is \\boxed{{{2 * i + (i % 5 == 0)}}}."


def scores(folder: Path) -> dict[str, str]:
    return {item.id: item.samples[0].verdict for item in read_items(folder)}


def test_every_item_is_asked_graded_and_written(data, tmp_path, checker):
    generator = Scripted(mostly_right)
    out = tmp_path / "runs" / "a"
    seen = []
    report = evaluate(
        find_task(data=data), out, generator, checker, GREEDY, chunk=4, progress=lambda r: seen.append(r.read)
    )
    assert [prompt for prompt, _ in generator.asked] == [(f"{i} + {i} = ?", BEGINNING) for i in range(13)]
    assert (report.read, report.written, report.complete, seen) == (13, 13, True, [4, 8, 12, 13])
    assert report.counts == {"right": 8, "wrong": 3, "unfinished": 1, "no answer": 1}
    assert scores(out) == {f"q{i}": "wrong" if i % 5 == 0 else "right" for i in range(13)} | {
        "q3": "unfinished",
        "q4": "no_answer",
    }
    items = list(read_items(out))
    assert [(item.prompt, item.answer, item.subject, item.level) for item in items] == [
        (record["prompt"], record["answer"], record["subject"], record["level"]) for record in sums(13)
    ]
    assert (items[1].samples[0].text, items[1].samples[0].prediction) == (mostly_right("1 + 1 = ?", 0), "2")
    assert {item.seed for item in items} == {GREEDY.seed}
    summary = summarise([item.score for item in items])
    assert summary.accuracy.value == 8 / 13
    assert (summary.unfinished, summary.no_answer) == (1 / 13, 1 / 13)


def test_instruction_and_beginning(data, tmp_path, checker):
    generator = Scripted(mostly_right)
    task = replace(find_task(data=data), instruction="Box the answer.", beginning="Well,")
    evaluate(task, tmp_path / "a", generator, checker, GREEDY, limit=1)
    assert [prompt for prompt, _ in generator.asked] == [("0 + 0 = ?\nBox the answer.", "Well,")]
    assert next(read_items(tmp_path / "a")).prompt == "0 + 0 = ?"
    assert read_settings(tmp_path / "a")["instruction"] == "Box the answer."


def test_several_samples_and_their_votes(data, tmp_path, checker):
    says = [" It is 1/2.", " \\boxed{0.5}", " \\boxed{7}", " \\boxed{\\frac{1}{2}}", " It is 7.0.", " no idea"]
    write_jsonl(data, [{"id": "a", "prompt": "p", "answer": "7"}, {"id": "b", "prompt": "p", "answer": "\\frac12"}])
    sampling = Sampling(n=6, temperature=0.8)
    generator = Scripted(lambda _, i: says[i])
    evaluate(find_task(data=data), tmp_path / "a", generator, checker, sampling)
    first, second = read_items(tmp_path / "a")
    assert [sample.verdict for sample in first.samples] == ["wrong", "wrong", "right", "wrong", "right", "no_answer"]
    assert [sample.group for sample in first.samples] == [1, 1, 0, 1, 0, None]
    assert [sample.group for sample in second.samples] == [0, 0, 1, 0, 1, None]
    assert (first.score.right, first.score.majority, first.score.no_answer) == (2, 0, 1)
    assert (second.score.right, second.score.majority) == (3, 1)
    assert len({item[1].seed for item in generator.asked}) == 1


def test_groups_are_of_an_item_alone(checker):
    drawn = [[Completion(f"\\boxed{{{x}}}", "stop") for x in answers] for answers in ("1213", "9929", "")]
    graded = graded_samples(["3", "9", "1"], "", drawn, checker)
    assert [[sample.group for sample in samples] for samples in graded] == [[1, 2, 1, 0], [0, 0, 1, 0], []]


def test_references_are_right(shared_data, tmp_path, checker):
    """GSM8K: every reference as the model's own words gives 100%."""
    words = {}
    for line in (shared_data / "gsm8k_test.jsonl").read_text().splitlines():
        record = json.loads(line)
        words[record["question"]] = " " + record["answer"]
    out = tmp_path / "a"
    task = find_task("gsm8k", shared_data / "gsm8k_test.jsonl")
    report = evaluate(task, out, Scripted(lambda problem, _: words[problem]), checker, GREEDY)
    assert report.counts == {"right": 1319}
    summary = summarise([item.score for item in read_items(out)])
    assert (summary.items, summary.accuracy.value, summary.accuracy.high) == (TASKS["gsm8k"].items, 1.0, 1.0)
    # And the answer of the next problem never is, unless it is the same.
    shifted = dict(zip(words, [*list(words.values())[1:], next(iter(words.values()))], strict=True))
    other = tmp_path / "b"
    evaluate(task, other, Scripted(lambda problem, _: shifted[problem]), checker, GREEDY)
    items = list(read_items(other))
    following = [item.answer for item in items[1:]] + [items[0].answer]
    same = [
        item.answer.replace(",", "") == after.replace(",", "") for item, after in zip(items, following, strict=True)
    ]
    assert [item.samples[0].verdict == "right" for item in items] == same


# ---- stopped and run again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(4))
def test_goes_on_where_it_was_stopped(data, tmp_path, checker, moment):
    whole, out = tmp_path / "whole", tmp_path / "out"
    sampling = Sampling(n=2, temperature=1)

    def noisy(generator: Scripted) -> Scripted:
        """Says something else with another seed, as a model does."""
        generator.say = lambda problem, i: f" {generator.asked[-1][1].seed} \\boxed{{{len(problem) + i}}}"
        return generator

    evaluate(find_task(data=data), whole, noisy(Scripted(mostly_right)), checker, sampling, chunk=4)
    generator = noisy(Scripted(mostly_right))
    say, said = generator.say, []

    def stop(problem: str, i: int) -> str | Completion:
        said.append(problem)
        if len(said) == 8 * moment + 2:
            raise KeyboardInterrupt
        return say(problem, i)

    generator.say = stop
    with pytest.raises(KeyboardInterrupt):
        evaluate(find_task(data=data), out, generator, checker, sampling, chunk=4)
    with pytest.raises(StepDPOError, match="has not come to its end"):
        list(read_items(out))
    report = evaluate(find_task(data=data), out, noisy(Scripted(mostly_right)), checker, sampling, chunk=4)
    assert report.resumed == 4 * moment
    assert (out / ITEMS_FILE).read_bytes() == (whole / ITEMS_FILE).read_bytes()


SLOW = """
import sys, time
from stepdpo_kernels.data.generation import Sampling
from stepdpo_kernels.evaluation.run import evaluate
from stepdpo_kernels.evaluation.tasks import find_task
from stepdpo_kernels.answers import AnswerChecker
from tests.evaluation.scripted import Scripted, answer_of

def say(problem, i):
    time.sleep(0.01)
    return f" \\\\boxed{{{answer_of(problem) + i}}}"

print("begun", flush=True)
with AnswerChecker() as checker:
    evaluate(find_task(data=sys.argv[1]), sys.argv[2], Scripted(say), checker, Sampling(n=2), chunk=3)
"""


@pytest.mark.slow
def test_killed_at_three_moments(tmp_path):
    data = write_jsonl(tmp_path / "sums.jsonl", sums(60))
    command = [sys.executable, "-c", SLOW, str(data)]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, timeout=120)
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([*command, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    subprocess.run([*command, str(tmp_path / "out")], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "out" / ITEMS_FILE).read_bytes() == (tmp_path / "whole" / ITEMS_FILE).read_bytes()


def test_another_setting_is_another_run(data, tmp_path, checker):
    def run(**options):
        return evaluate(
            find_task(data=data), tmp_path / "a", Scripted(mostly_right), checker, GREEDY, **({"chunk": 4} | options)
        )

    run(settings={"template": "chat"})
    with pytest.raises(StepDPOError, match="begun with template 'chat', and now it is 'none'"):
        run(settings={"template": "none"})
    with pytest.raises(StepDPOError, match="begun with limit None, and now it is 5"):
        run(settings={"template": "chat"}, limit=5)
    assert run(settings={"template": "none"}, overwrite=True).written == 13


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def test_a_sample_that_cannot_be_had(data, tmp_path, checker):
    def say(problem: str, i: int) -> str | Completion:
        return Completion("", "failed", "HTTP 400: too long") if problem.startswith("7 ") else mostly_right(problem, i)

    task = find_task(data=data)
    with pytest.raises(StepDPOError, match=r"problem 'q7': the model gave no answer: HTTP 400: too long; run again"):
        evaluate(task, tmp_path / "a", Scripted(say), checker, GREEDY, chunk=2)
    assert evaluate(task, tmp_path / "a", Scripted(mostly_right), checker, GREEDY, chunk=2).resumed == 6
    evaluate(task, tmp_path / "b", Scripted(say), checker, GREEDY, on_bad="skip")
    summary = summarise([item.score for item in read_items(tmp_path / "b")])
    assert (summary.items, summary.failed, summary.accuracy.value) == (13, 1 / 13, 7 / 13)
    sample = list(read_items(tmp_path / "b"))[7].samples[0]
    assert (sample.verdict, sample.reason, sample.prediction) == ("failed", "HTTP 400: too long", None)


def test_bad_problems(data, tmp_path, checker):
    lines = [json.dumps(record) for record in sums(3)]
    data.write_text(
        "\n".join([lines[0], '{"prompt": "p"', lines[1], lines[1], '{"prompt": "", "answer": "1"}', lines[2]])
    )
    with pytest.raises(StepDPOError, match=r"sums.jsonl, line 2: malformed JSON"):
        evaluate(find_task(data=data), tmp_path / "a", Scripted(mostly_right), checker, GREEDY)
    report = evaluate(find_task(data=data), tmp_path / "b", Scripted(mostly_right), checker, GREEDY, on_bad="skip")
    assert (report.written, report.skipped) == (3, {"unreadable": 2, "duplicate ids": 1})
    assert list(scores(tmp_path / "b")) == ["q0", "q1", "q2"]


def test_a_right_answer_that_is_no_mathematics(data, tmp_path, checker):
    """The item stays, whatever a model answers to it: two runs have the same items."""
    write_jsonl(data, [{"id": "a", "prompt": "p", "answer": "\\foo{$$"}, {"id": "b", "prompt": "p", "answer": "1"}])
    report = evaluate(find_task(data=data), tmp_path / "a", Scripted(lambda *_: " \\boxed{1}"), checker, GREEDY)
    assert report.counts["right"] == report.counts["wrong"] == 1
    assert report.counts["compared in vain (unreadable gold)"] == 1


def test_folders_without_a_run(data, tmp_path, checker):
    with pytest.raises(StepDPOError, match=f"there is no {ITEMS_FILE} in it"):
        list(read_items(tmp_path))
    evaluate(find_task(data=data), tmp_path / "a", Scripted(mostly_right), checker, GREEDY)
    file = tmp_path / "a" / ITEMS_FILE
    good = file.read_text()
    for bad in ("{}", "[1]", "nonsense", good.splitlines()[0].replace('"right"', '"maybe"').replace("wrong", "odd")):
        file.write_text(good + bad + "\n")
        with pytest.raises(StepDPOError, match=r"items.jsonl, line 14: "):
            list(read_items(tmp_path / "a"))
    run_file(file).unlink()
    with pytest.raises(StepDPOError, match="not the run file of a run"):
        read_settings(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("")
    with pytest.raises(StepDPOError, match=r"output folder .* cannot be made"):
        evaluate(find_task(data=data), tmp_path / "a", Scripted(mostly_right), checker, GREEDY)


def test_tasks(data):
    assert set(TASKS) == {"gsm8k", "math", "math500", "aime2024", "odyssey-math"}
    assert all(task.max_new_tokens == 2048 and task.beginning == BEGINNING for task in TASKS.values())
    assert len(TASKS["math"].sources) == 7
    task = find_task("math", data)
    assert (task.title, task.sources, task.format, task.items) == ("MATH", (str(data),), None, None)
    assert find_task("math", split="train").split == "train"
    for arguments, message in (
        ((), "nothing to evaluate on: name a task"),
        (("gsm9k",), "task must be one of gsm8k, math, .*; got 'gsm9k'"),
        (("odyssey-math",), "task 'odyssey-math' has no hub dataset: get final-odyssey-math-with-levels.jsonl"),
    ):
        with pytest.raises(StepDPOError, match=message):
            find_task(*arguments)
