"""`stepdpo prepare`: the stages by the command, at a server of the OpenAI protocol on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from stepdpo_kernels.cli import main
from tests.openai_server import OpenAIServer, Request, Status

PROBLEMS = [{"id": f"p{i}", "prompt": f"What is 1 + 2 + {i}?", "answer": str(3 + i)} for i in range(1, 6)]


SERVED = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--template", "none"]


def answer(request: Request) -> str:
    """A model that adds wrongly from the start, rightly when asked to go on from the marker alone for the 2nd time."""
    body = request.body
    if "messages" in body:
        return "Final Decision: Step 1: incorrect; Step 2: correct"
    number = int(body["prompt"].split("+ ")[2].split("?")[0])
    if body["max_tokens"] == 100:  # collect
        return f" 1 + 2 = 4.\nStep 2: 4 + {number} = {4 + number}. The answer is {4 + number}."
    return f" 1 + 2 = 3.\nStep 2: 3 + {number} = {3 + number}. The answer is {3 + number}."


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *arguments])
    return int(ended.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    Path("problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return tmp_path


def at(server: OpenAIServer, *more: str) -> list[str]:
    return ["--model", "tiny", "--base-url", server.url, "--template", "none", "--chunk", "2", *more]


def collected(server: OpenAIServer) -> None:
    options = at(server, "--max-new-tokens", "100", "--n", "1")
    assert run("collect", "problems.jsonl", "--output", "solutions.jsonl", *options) == 0


def test_three_stages(folder, capfd):
    with OpenAIServer(answer) as server:
        collected(server)
        assert run("locate", "solutions.jsonl", "--output", "located.jsonl") == 0
        rectify = ["rectify", "located.jsonl", "--output", "pairs.jsonl", *at(server, "--n", "3", "--verify", "exact")]
        assert run(*rectify) == 0
        assert run(*rectify) == 0  # again: nothing to do
    said = capfd.readouterr()
    assert "sk-secret" not in said.out + said.err
    assert "5  written to pairs.jsonl" in said.out
    pairs = lines(folder / "pairs.jsonl")
    assert [pair["id"] for pair in pairs] == [f"p{i}/0/0" for i in range(1, 6)]
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {(" 1 + 2 = 3.", " 1 + 2 = 4.")}
    assert "sk-secret" not in "".join(path.read_text() for path in folder.iterdir())


def test_a_judge_beside_the_exact_locator(folder, capsys):
    with OpenAIServer(answer) as server:
        collected(server)
        judge = ["--locator", "judge", "--judge-url", server.url, "--judge-model", "tiny", "--compare", "exact"]
        assert run("locate", "solutions.jsonl", "--output", "located.jsonl", *judge, "--price-in", "2") == 0
    said = capsys.readouterr().out
    assert "5  located" in said
    assert "requests" in said
    assert re.search(r"0\.0\d+  cost\n", re.sub(" +\n", "\n", said))
    assert "Agreement of judge (a) and exact (b)" in said
    assert {record["locator"] for record in lines(folder / "located.jsonl")} == {"judge"}


def test_a_person_as_locator(folder, capsys):
    with OpenAIServer(answer) as server:
        collected(server)
    assert run("review", "solutions.jsonl", "--output", "review.md", "--limit", "2") == 0
    review = folder / "review.md"
    question = "(1 to 2, 0 for none, ? for undecided):"
    review.write_text(review.read_text().replace(question, question + " 2", 1))
    human = ["--locator", "human", "--review", "review.md"]
    assert run("locate", "solutions.jsonl", "--output", "located.jsonl", *human) == 0
    assert [record["first_wrong_step"] for record in lines(folder / "located.jsonl")] == [2, None, None, None, None]
    assert run("review", "solutions.jsonl", "--output", "review.md") == 2  # it may be filled in
    assert "may be filled in" in capsys.readouterr().err


def test_rollouts(folder, capsys):
    with OpenAIServer(answer) as server:
        collected(server)
        rollout = ["--locator", "rollout", "--rollouts", "2", *at(server)]
        assert run("locate", "solutions.jsonl", "--output", "located.jsonl", *rollout) == 0
    assert "continuations" in capsys.readouterr().out
    # It finds the answer whatever the first step says.
    assert {record["first_wrong_step"] for record in lines(folder / "located.jsonl")} == {2}


def test_a_server_that_fails_costs_nothing_that_was_done(folder, capsys):
    with OpenAIServer(answer) as server:
        options = at(server, "--max-new-tokens", "100", "--n", "1", "--retries", "0")
        broken = OpenAIServer(lambda request: answer(request) if len(broken.requests) <= 2 else Status(500))
        with broken:
            there = [broken.url if option == server.url else option for option in options]
            assert run("collect", "problems.jsonl", "--output", "solutions.jsonl", *there) == 2
        assert "failed on all of 2 requests, last with: 500" in capsys.readouterr().err
        assert len(lines(folder / "solutions.jsonl")) == 2
        assert run("collect", "problems.jsonl", "--output", "solutions.jsonl", *options) == 0
    assert [record["problem_id"] for record in lines(folder / "solutions.jsonl")] == [f"p{i}" for i in range(1, 6)]


def test_import_and_export(folder, capsys):
    record = {"prompt": "P", "chosen": "Step 1: a\nStep 2: b", "rejected": "Step 1: a\nStep 2: c"}
    (folder / "theirs.jsonl").write_text(json.dumps(record) + "\n")
    assert run("import", "theirs.jsonl", "--format", "preference", "--output", "pairs.jsonl") == 0
    assert run("export", "pairs.jsonl", "--format", "trl", "--output", "trl.jsonl") == 0
    (trl,) = lines(folder / "trl.jsonl")
    assert trl["chosen"] == [{"role": "assistant", "content": record["chosen"]}]
    before = (folder / "pairs.jsonl").read_bytes()
    for overwrite in ([], ["--overwrite"]):
        assert run("export", "pairs.jsonl", "--format", "trl", "--output", "pairs.jsonl", *overwrite) == 2
        assert "is what is to be read: name another file" in capsys.readouterr().err
    assert run("export", "theirs.jsonl", "--format", "trl", "--output", "pairs.jsonl") == 2
    assert "was written by stage 'import'" in capsys.readouterr().err
    assert (folder / "pairs.jsonl").read_bytes() == before


def test_interrupted(folder, capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with OpenAIServer(answer) as server:
        collected(server)
        monkeypatch.setattr("stepdpo_kernels.data.pipeline.locate.exact.ExactLocator.locate", interrupt)
        assert run("locate", "solutions.jsonl", "--output", "located.jsonl") == 130
    assert "locate was interrupted; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["collect", "nowhere.jsonl", "--output", "x.jsonl", *SERVED], "nowhere.jsonl: no such file or folder"),
        (["locate", "problems.jsonl", "--output", "y.jsonl", "--locator", "judge"], "--judge-url and --judge-model"),
        (["locate", "problems.jsonl", "--output", "y.jsonl", "--locator", "human"], "needs --review"),
        (["locate", "problems.jsonl", "--output", "y.jsonl", "--locator", "rollout"], "rollouts need --model"),
        (
            ["collect", "problems.jsonl", "--output", "y.jsonl", "--model", "m", "--backend", "openai"],
            "belong together",
        ),
        (["collect", "problems.jsonl", "--output", "no/x.jsonl", *SERVED], "there is no folder"),
        (["collect", "problems.jsonl", "--output", "y.jsonl", *SERVED, "--continuous"], "--continuous is of --backend"),
    ],
)
def test_what_is_wrong_is_said(folder, capsys, arguments, said):
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_places_are_checked_before_a_model_is_loaded(folder, capsys):
    for source, output, said in (
        ("no.jsonl", "x.jsonl", "no.jsonl"),
        ("problems.jsonl", "no/x.jsonl", "no folder 'no'"),
    ):
        assert run("collect", source, "--output", output, "--model", "./no_such_model") == 2
        assert said in capsys.readouterr().err


def test_options_and_the_stage_before_are_checked_before_a_model_is_loaded(folder, capsys):
    with OpenAIServer(answer) as server:
        collected(server)
    assert run("locate", "solutions.jsonl", "--output", "located.jsonl") == 0
    unfinished = Path("located.jsonl.run.json")
    for command, source, options, said in (
        ("collect", "problems.jsonl", ["--step-pattern", "x"], "a step pattern belongs to steps by pattern"),
        ("collect", "problems.jsonl", ["--temperature", "0"], "at temperature 0"),
        ("rectify", "located.jsonl", ["--verify", "judge"], "--judge-url and --judge-model"),
        ("rectify", "located.jsonl", ["--top-p", "2"], "top_p must be"),
    ):
        assert run(command, source, "--output", "x.jsonl", "--model", "./no_such_model", *options) == 2
        assert said in capsys.readouterr().err
    unfinished.write_text(unfinished.read_text().replace('"complete": true', '"complete": false'))
    assert run("rectify", "located.jsonl", "--output", "x.jsonl", "--model", "./no_such_model") == 2
    assert "has not come to its end" in capsys.readouterr().err


def test_nothing_to_agree_about(folder, capsys):
    with OpenAIServer(answer) as server:
        collected(server)
    right = [record | {"verdict": "right"} for record in lines(folder / "solutions.jsonl")]
    (folder / "right.jsonl").write_text("".join(json.dumps(record) + "\n" for record in right))
    assert run("locate", "right.jsonl", "--output", "located.jsonl", "--compare", "exact") == 0
    assert "5  right solutions" in capsys.readouterr().out


def test_nobody_listens(folder, capsys):
    assert run("collect", "problems.jsonl", "--output", "x.jsonl", *SERVED, "--retries", "0") == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert not (folder / "x.jsonl").read_text()


def test_continuous_batching_needs_a_gpu(folder, tiny_model, tiny_tokenizer, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    tiny_model("qwen2").save_pretrained("model")
    tiny_tokenizer("qwen2").save_pretrained("model")
    options = ["--model", "model", "--template", "none", "--dtype", "float32", "--n", "1", "--max-new-tokens", "5"]
    assert run("collect", "problems.jsonl", "--output", "x.jsonl", *options, "--continuous") == 2
    assert "continuous: on a CPU" in capsys.readouterr().err
    assert run("collect", "problems.jsonl", "--output", "x.jsonl", *options, "--keep", "all") == 0
    assert {record["verdict"] for record in lines(folder / "x.jsonl")} <= {"unfinished", "no_answer"}
    assert all(record["steps"][0]["logp"] <= 0 for record in lines(folder / "x.jsonl"))
