"""`stepdpo evaluate`: a run, the same run again, two runs, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepdpo_kernels.cli import main
from stepdpo_kernels.cli.options import GeneratorOptions
from stepdpo_kernels.data.generation import Completion
from stepdpo_kernels.evaluation.run import ITEMS_FILE, read_items
from tests.evaluation.scripted import Scripted, answer_of, sums, write_jsonl


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with 12 problems in `sums.jsonl`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_jsonl(tmp_path / "sums.jsonl", sums(12))
    return tmp_path


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Scripted]:
    """Two models by the names that --model takes: "good" errs on item 3, "bad" on 3, 4 and all after it."""

    def model(name: str, is_wrong: Callable[[int], bool]) -> Scripted:
        def say(problem: str, i: int) -> str | Completion:
            answer = answer_of(problem)
            return f" So it is \\boxed{{{answer + is_wrong(answer // 2)}}}."

        return Scripted(say, name)

    models = {"good": model("good", lambda i: i == 3), "bad": model("bad", lambda i: i >= 3)}
    monkeypatch.setattr(GeneratorOptions, "build", lambda self: models[self.model])
    return models


def evaluate(model: str, out: str, *more: str) -> int:
    return run("--model", model, "--data", "sums.jsonl", "--output-dir", out, "--template", "none", *more)


def row(output: str, name: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if re.match(rf" *{re.escape(name)}  ", line))
    return re.split(r"  +", line.strip())[1:]


def test_a_run(folder, models, capsys):
    assert evaluate("good", "out") == 0
    out = capsys.readouterr().out
    assert "sums.jsonl: good, 12 items" in out
    assert row(out, "accuracy") == ["91.7%", "8.33", "64.6 to 98.5"]
    assert row(out, "even") == ["6", "100.0%", "0.00", "0.0%", "0.0%"]
    assert row(out, "Level 1")[:2] == ["4", "75.0%"]
    assert "unfinished, counted" not in out
    assert {path.name for path in Path("out").iterdir()} == {
        *(ITEMS_FILE, f"{ITEMS_FILE}.run.json", "metrics.json", "report.md", "report.html")
    }
    prompt, sampling = models["good"].asked[0]
    assert prompt == ("0 + 0 = ?", "Let's think step by step.\nStep 1:")
    assert (sampling.n, sampling.temperature, sampling.max_new_tokens, sampling.logps) == (1, 0.0, 2048, False)
    # Again: nothing is asked that was asked before.
    assert evaluate("good", "out") == 0
    assert len(models["good"].asked) == 12
    assert row(capsys.readouterr().out, "accuracy") == ["91.7%", "8.33", "64.6 to 98.5"]
    assert evaluate("good", "out", "--overwrite") == 0
    assert len(models["good"].asked) == 24


def test_several_samples(folder, models, capsys):
    options = ("--n", "8", "--temperature", "0.8", "--seed", "3", "--max-new-tokens", "99", "--limit", "5")
    assert evaluate("good", "out", *options, "--instruction", "Be quick.", "--beginning", "Step 1:\\nWell,") == 0
    out = capsys.readouterr().out
    for name in ("mean over 8 samples", "maj@8", "pass@2", "pass@4", "pass@8"):
        assert row(out, name)[0] == "80.0%"
    prompt, sampling = models["good"].asked[4]
    assert prompt == ("4 + 4 = ?\nBe quick.", "Step 1:\nWell,")
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (8, 0.8, 0.95, 99)
    assert len(models["good"].asked) == 5


def test_two_runs(folder, models, capsys):
    assert evaluate("bad", "b") == 0
    assert evaluate("good", "a", "--compare", "b") == 0
    sentence = (
        "good against bad on the same 12 items: +66.7 points (standard error 14.21); better on 8, worse on 0; "
        "McNemar's exact test, two-sided: p = 0.00781."
    )
    assert sentence in capsys.readouterr().out
    assert json.loads(Path("a/metrics.json").read_text())["comparison"]["better"] == 8
    # And without a model.
    asked = len(models["good"].asked)
    assert run("--output-dir", "b", "--compare", "a") == 0
    out = capsys.readouterr().out
    assert "bad against good on the same 12 items: -66.7 points" in out
    assert "better on 0, worse on 8" in out
    assert row(out, "accuracy")[0] == "25.0%"
    assert len(models["good"].asked) == asked


def test_what_was_cut_off_is_said(folder, models, capsys):
    def say(problem: str, i: int) -> Completion:
        return Completion(f" \\boxed{{{answer_of(problem)}}}", "stop" if answer_of(problem) else "length")

    models["good"].say = say
    lines = Path("sums.jsonl").read_text()
    Path("sums.jsonl").write_text(lines + "nonsense\n")
    assert evaluate("good", "out", "--on-bad", "skip") == 0
    out = capsys.readouterr().out
    assert "8.3% of the samples unfinished, counted as not right" in out
    assert "1 records left out: unreadable" in out
    assert row(out, "accuracy")[0] == "91.7%"


def test_progress(folder, models, capsys):
    assert evaluate("good", "out", "--chunk", "5") == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"evaluate: 12 items, .* passed, 91.7% right", lines[-1])
    assert sum("12 items" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "good"], "nothing to evaluate on: name a task (gsm8k, math,"),
        (["--model", "good", "--task", "gsm9k"], "task must be one of gsm8k"),
        (["--model", "good", "--data", "gone.jsonl"], "gone.jsonl: no such file or folder"),
        (["--model", "good", "--data", "sums.jsonl", "--n", "4"], "n is 4 at temperature 0"),
        (["--model", "good", "--data", "sums.jsonl", "--compare", "gone"], "gone: no run of stepdpo evaluate"),
        (["--model", "good", "--data", "sums.jsonl", "--format", "odd"], "format must be one of gsm8k, math"),
        (["--data", "sums.jsonl"], "nothing is asked without --model"),
        (["--task", "gsm8k"], "nothing is asked without --model"),
        (["--n", "4", "--temperature", "1"], "nothing is asked without --model"),
        ([], "out: no run of stepdpo evaluate"),
    ],
)
def test_refused(folder, models, capsys, arguments, message):
    assert run("--output-dir", "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert models["good"].asked == []
    assert not (folder / "out" / "report.md").exists()


def test_runs_on_other_items(folder, models, capsys):
    assert evaluate("bad", "b", "--limit", "11") == 0
    assert evaluate("good", "a", "--compare", "b") == 2
    assert "1 only in the first run ('q11'); none only in the second run" in capsys.readouterr().err
    assert len(list(read_items("a"))) == 12  # the run itself is there
    assert not Path("a/report.md").exists()


def test_a_model_trained_anew_is_another(folder, models, capsys):
    """The same folder with other weights does not get the results of the old ones."""
    weights = folder / "trained" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    models["trained"] = models["good"]
    assert evaluate("trained", "out") == 0
    weights.write_bytes(b"other")
    assert evaluate("trained", "out") == 2
    assert "was begun with weights '3 bytes, written" in capsys.readouterr().err


def test_a_tiny_model(
    folder: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model, through transformers: it is right on none, and greedy twice is the same."""
    tiny_model("llama").save_pretrained("tiny")
    tiny_tokenizer("llama").save_pretrained("tiny")
    options = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6", "--limit", "3")
    for out in ("a", "b"):
        assert run("--model", "tiny", "--data", "sums.jsonl", "--output-dir", out, *options) == 0
    assert "transformers:tiny, 3 items" in capsys.readouterr().out
    items = list(read_items("a"))
    assert [item.id for item in items] == ["q0", "q1", "q2"]
    assert all(item.samples[0].text and item.samples[0].finish == "length" for item in items)
    assert Path("a", ITEMS_FILE).read_bytes() == Path("b", ITEMS_FILE).read_bytes()
