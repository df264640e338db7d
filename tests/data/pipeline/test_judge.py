"""The locator `judge` at a server on loopback: its requests, what the server does to them, what comes back."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from pathlib import Path

import pytest

from stepdpo_kernels.data.generation.openai_client import OpenAIClient
from stepdpo_kernels.data.pipeline.locate.judge import JudgeLocator
from stepdpo_kernels.data.pipeline.locate.protocol import Location, Locator
from stepdpo_kernels.data.pipeline.locate.reply import SCHEMA
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.steps import StepFormat, Steps
from stepdpo_kernels.types import StepDPOError
from tests.openai_server import Cut, Hang, OpenAIServer, Raw, Request, Reset, Status

pytest.importorskip("openai")

KEY = "sk-a-secret-of-the-tests"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def solution(wrong: int = 2, of: int = 3, **fields) -> Solution:
    """A solution whose problem tells the server which step to name."""
    steps = StepFormat().split("".join(f"\nStep {k}: {k} + 1 = {k + 1}" for k in range(1, of + 1)))
    values = {
        "id": f"{wrong}/{of}",
        "problem_id": "p",
        "prompt": f"Say {wrong} of {of}.",
        "answer": "7",
        "reference": None,
        "sample": 0,
        "seed": 0,
        "generator": "g",
        "steps": steps,
        "logps": (None,) * of,
        "finish": "stop",
        "prediction": "8",
        "verdict": "wrong",
    }
    return Solution(**(values | fields))


def asked(request: Request) -> str:
    return request.body["messages"][-1]["content"]


def as_text(wrong: int, of: int) -> str:
    verdicts = "; ".join(f"Step {k}: {'incorrect' if k == wrong else 'correct'}" for k in range(1, of + 1))
    return f"I looked at it.\n\nFinal Decision: {verdicts}"


def as_json(wrong: int, of: int) -> str:
    steps = [{"step": k, "explanation": f"so {k}", "correct": k != wrong} for k in range(1, of + 1)]
    return json.dumps({"steps": steps, "first_wrong_step": wrong})


def honest(request: Request) -> str:
    """The step that the problem names, in the form that was asked for."""
    match = re.search(r"Say (\d+) of (\d+)", asked(request))
    assert match
    form = as_json if "response_format" in request.body else as_text
    return form(int(match[1]), int(match[2]))


def judge(server: OpenAIServer, *, retries: int = 2, timeout: float = 10.0, concurrency: int = 4, **options):
    client = OpenAIClient(server.url, "tiny", retries=retries, timeout=timeout, concurrency=concurrency, backoff=0.001)
    return JudgeLocator(client, **options)


def total(locations: list[Location]) -> Counter[str]:
    return sum((location.counts for location in locations), Counter())


CASES = [(2, 3), (1, 1), (0, 4), (5, 5), (3, 4), (0, 1), (7, 12), (1, 9)]


def test_locations_come_in_order_by_structured_output() -> None:
    together = threading.Barrier(4)

    def answer(request: Request) -> str:
        together.wait(10)  # for four requests under way at a time
        return honest(request)

    with OpenAIServer(answer) as server:
        locator: Locator = judge(server, concurrency=4)
        locations = locator.locate([solution(*case) for case in CASES], seed=100)
        assert [location.step for location in locations] == [wrong for wrong, _ in CASES]
        assert locations[0].explanation == "so 2"
        bodies = [request.body for request in server.requests]
    assert len(bodies) == len(CASES)
    assert len({body["seed"] for body in bodies}) == len(CASES)
    for body in bodies:
        assert body["response_format"]["json_schema"]["schema"] == SCHEMA
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 4096, "tiny")


def test_counts_add_up_to_what_the_server_was_asked() -> None:
    with OpenAIServer(honest) as server:
        locator = judge(server, price_in=2.5, price_out=10)
        counts = total(locator.locate([solution(*case) for case in CASES], seed=0))
        words = sum(len(asked(request).split()) for request in server.requests)
        answers = sum(len(honest(request).split()) for request in server.requests)
        assert counts == Counter(
            requests=len(CASES),
            prompt_tokens=words,
            completion_tokens=answers,
            cost_micros=round(words * 2.5 + answers * 10),
        )
        again = total(locator.locate([solution()], seed=0))
    assert again["requests"] == 1
    assert "cost_micros" not in total(judge_once())


def judge_once() -> list[Location]:
    with OpenAIServer(honest) as server:
        return judge(server).locate([solution()], seed=0)


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("message", ["response_format is not supported", "no such thing here"])
def test_a_server_without_structured_output_is_asked_for_text(status: int, message: str) -> None:
    def answer(request: Request) -> str | Status:
        return Status(status, message) if "response_format" in request.body else honest(request)

    with OpenAIServer(answer) as server:
        locator = judge(server, concurrency=1)
        locations = locator.locate([solution(*case) for case in CASES], seed=0)
        assert [location.step for location in locations] == [wrong for wrong, _ in CASES]
        refused = [request for request in server.requests if "response_format" in request.body]
        assert len(refused) == 1  # and never again
        assert len(server.requests) == len(CASES) + 1
        assert all("Final Decision" in asked(request) for request in server.requests[1:])


def test_options_that_a_server_refuses_by_name_are_left_out() -> None:
    def answer(request: Request) -> str | Status:
        for name in ("seed", "max_tokens", "temperature"):
            if name in request.body:
                return Status(400, f"Unsupported parameter: '{name}'")
        assert request.body["max_completion_tokens"] == 4096
        return honest(request)

    with OpenAIServer(answer) as server:
        locations = judge(server, concurrency=1).locate([solution(*case) for case in CASES], seed=0)
        assert [location.step for location in locations] == [wrong for wrong, _ in CASES]
        assert len(server.requests) == len(CASES) + 3
        assert "response_format" in server.requests[-1].body


def test_a_request_refused_for_one_solution_leaves_the_others_and_the_options() -> None:
    def answer(request: Request) -> str | Status:
        return Status(400, "maximum context length exceeded") if "of 12" in asked(request) else honest(request)

    with OpenAIServer(answer) as server:
        locations = judge(server, concurrency=1).locate([solution(7, 12), solution(2, 3), solution(7, 12)], seed=0)
        assert [location.step for location in locations] == [None, 2, None]
        assert locations[0].problem == "request refused"
        assert "maximum context length" in locations[0].explanation
        assert sum("response_format" in request.body for request in server.requests) == 3
        locator = judge(server)
        with pytest.raises(StepDPOError, match=r"failed on all of 2 solutions.*context length"):
            locator.locate([solution(7, 12), solution(8, 12)], seed=0)  # is it the server, or the options?
        assert locator.locate([solution(7, 12)], seed=0)[0].problem == "request refused"
        locator.locate([solution(2, 3)], seed=0)
        found = locator.locate([solution(7, 12), solution(8, 12)], seed=0)  # no: it takes others
        assert [location.problem for location in found] == ["request refused"] * 2


def test_faults_on_the_way_are_tried_again() -> None:
    faults = [Status(429, headers={"Retry-After": "0"}), Status(500), Cut(), Reset(), Hang(), Raw(b'{"choices": [')]
    with OpenAIServer(honest, faults=faults) as server:
        locations = judge(server, retries=6, timeout=0.5).locate([solution(*case) for case in CASES], seed=0)
        assert [location.step for location in locations] == [wrong for wrong, _ in CASES]
        counts = total(locations)
        assert (counts["requests"], counts["retries"]) == (len(CASES), 6)
        assert counts["unreadable_replies"] == 0


def test_a_solution_that_the_server_fails_on_is_undecided() -> None:
    def answer(request: Request) -> str | Status:
        return Status(500, "out of memory") if "of 12" in asked(request) else honest(request)

    with OpenAIServer(answer) as server:
        locations = judge(server).locate([solution(2, 3), solution(7, 12)], seed=0)
        assert [(x.step, x.problem) for x in locations] == [(2, ""), (None, "no reply")]
        assert "out of memory" in locations[1].explanation
        # Alone it may be to blame itself; two of two mean that the server is.
        assert judge(server).locate([solution(7, 12)], seed=0)[0].problem == "no reply"
        with pytest.raises(StepDPOError, match=r"failed on all of 2 solutions.*out of memory"):
            judge(server).locate([solution(7, 12), solution(8, 12)], seed=0)


def test_no_server_and_no_model() -> None:
    with OpenAIServer(honest, models=("large",)) as server:
        with pytest.raises(StepDPOError, match="large"):
            judge(server).locate([solution()], seed=0)
        gone = judge(server)
    with pytest.raises(StepDPOError, match="no server answers"):
        gone.locate([solution()], seed=0)


RAMBLE = "Step 2 could be wrong, or Step 3. Let me think about it again. " * 500


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (RAMBLE, "no decision"),
        ({"text": RAMBLE, "finish_reason": "length"}, "reply cut off"),
        ({"text": as_json(2, 3)[:-9], "finish_reason": "length"}, "reply cut off"),
        (as_json(2, 3)[:-9], "no decision"),
        ("", "empty reply"),
        ({"text": None}, "empty reply"),
        (as_text(9, 9), "no such step"),
        (as_text(2, 3) + "; Step 2: correct", "contradiction"),
        ("Final Decision: Step 3: incorrect", "a step is left out"),
    ],
)
def test_a_reply_that_cannot_be_read_is_asked_for_again_then_undecided(reply, problem: str) -> None:
    with OpenAIServer(lambda _: reply) as server:
        (location,) = judge(server, tries=3).locate([solution()], seed=7)
        assert (location.step, location.problem) == (None, problem)
        assert location.counts["unreadable_replies"] == location.counts["requests"] == 3
        seeds = [request.body["seed"] for request in server.requests]
        assert len(set(seeds)) == 3
        assert [request.body["temperature"] for request in server.requests] == [0, 0.5, 0.5]
        judge(server, tries=3).locate([solution(1, 3), solution()], seed=7)
        assert {*seeds} <= {request.body["seed"] for request in server.requests[3:]}  # whatever comes before it

    replies = iter([reply, as_json(2, 3)])
    with OpenAIServer(lambda _: next(replies)) as server:
        (location,) = judge(server, tries=3).locate([solution()], seed=7)
        assert (location.step, location.counts["unreadable_replies"]) == (2, 1)


def test_a_solution_without_steps_asks_nothing() -> None:
    with OpenAIServer(honest) as server:
        (location,) = judge(server).locate([solution(steps=Steps("", ()), logps=())], seed=0)
        assert (location.step, location.problem) == (None, "no steps")
        assert judge(server).locate([], seed=0) == []
        assert server.requests == []


def test_a_prompt_file_of_a_user(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("{problem}\n{steps}\nEnd with 'Final Decision: Step 1: correct; ...'", "utf-8")
    with OpenAIServer(honest) as server:
        locator = judge(server, prompt_file=file)
        assert locator.locate([solution(1, 2)], seed=0)[0].step == 1
        (request,) = server.requests
        # It says itself how to answer.
        assert "response_format" not in request.body
        start = "Say 1 of 2.\nStep 1: 1 + 1 = 2\nStep 2: 2 + 1 = 3\nEnd with"
        assert asked(request).startswith(start)
        assert locator.settings != judge(server).settings
        assert judge(server).settings == judge(server).settings
        file.write_text("{problem}")
        with pytest.raises(StepDPOError, match=r"prompt\.txt: \{steps\} is missing"):
            judge(server, prompt_file=file)


def test_text_can_be_asked_for_and_the_temperature_left_to_the_server() -> None:
    with OpenAIServer(honest) as server:
        assert judge(server, structured=False, temperature=None).locate([solution()], seed=0)[0].step == 2
        (request,) = server.requests
    assert not {"response_format", "temperature"} & set(request.body)


@pytest.mark.parametrize("option", ["temperature", "max_tokens", "tries", "price_in", "price_out"])
def test_options_that_make_no_sense(option: str) -> None:
    with OpenAIServer(honest) as server, pytest.raises(StepDPOError, match=rf"{option} of the judge must .* got -1"):
        judge(server, **{option: -1})


def test_the_key_is_sent_and_shows_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def answer(request: Request) -> str | Status:
        echo = request.headers["authorization"]
        return Status(400, f"refused for {echo}") if "of 12" in asked(request) else honest(request)

    seen = []
    with OpenAIServer(answer, key=KEY, faults=[Status(500, f"failed for {KEY}")]) as server:
        locator = judge(server)
        locations = locator.locate([solution(2, 3), solution(7, 12)], seed=0)
        assert [location.step for location in locations] == [2, None]
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        seen += [repr(locator), repr(vars(locator)), repr(locator.settings), repr(locations)]
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "-wrong")
        with pytest.raises(StepDPOError, match="refused the key in OPENAI_API_KEY") as caught:
            locator.locate([solution()], seed=0)
        seen.append(str(caught.value))
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(StepDPOError, match="refused no key") as caught:
            locator.locate([solution()], seed=0)
    with OpenAIServer(lambda _: Status(500, f"failed for {KEY}")) as server:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(StepDPOError, match="failed on all") as caught:
            judge(server).locate([solution(), solution()], seed=0)
        seen.append(str(caught.value))
    out, err = capfd.readouterr()
    for text in (*seen, caplog.text, out, err):
        assert KEY not in text
    assert "refused for" in seen[3]
    assert "***" in seen[3]
