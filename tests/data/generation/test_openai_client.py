"""Requests against a real server on loopback: what is retried, what is not, and what never leaves the process."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import formatdate
from typing import Any

import pytest

pytest.importorskip("openai")

from stepdpo_kernels import StepDPOError
from stepdpo_kernels.data.generation.openai_client import OpenAIClient, Reply, Session, _retry_after
from tests.openai_server import Cut, Endless, Fault, Hang, OpenAIServer, Raw, Request, Reset, Status

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., OpenAIServer]]:
    with ExitStack() as stack:

        def start(answer: Callable[[Request], Any] = lambda request: "fine", **options: Any) -> OpenAIServer:
            return stack.enter_context(OpenAIServer(answer, **options))

        yield start


def client(server: OpenAIServer, **options: Any) -> OpenAIClient:
    return OpenAIClient(server.url, options.pop("model", "tiny"), **{"backoff": 0.01, "timeout": 10.0, **options})


async def complete(session: Session, prompt: str) -> Reply:
    return await session.complete(prompt=prompt, max_tokens=8)


async def chat(session: Session, prompt: str) -> Reply:
    return await session.chat(messages=[{"role": "user", "content": prompt}])


@pytest.mark.parametrize("work", [complete, chat])
def test_answers_come_in_order_and_are_counted(serve: Callable[..., OpenAIServer], work: Any) -> None:
    def answer(request: Request) -> str:
        asked = request.body.get("prompt") or request.body["messages"][0]["content"]
        time.sleep(0.03 * (3 - int(asked[-1])))  # the first is the slowest
        return f"after {asked}"

    asked = [f"number {i}" for i in range(4)]
    server = serve(answer)
    made = client(server)
    replies = made.map(work, asked)
    assert [reply.text for reply in replies] == [f"after {text}" for text in asked]
    assert (made.usage.requests, made.usage.prompt_tokens, made.usage.completion_tokens) == (4, 8, 12)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer EMPTY"}


def test_no_more_requests_at_a_time_than_allowed(serve: Callable[..., OpenAIServer]) -> None:
    def answer(request: Request) -> str:
        time.sleep(0.05)
        return "fine"

    server = serve(answer)
    client(server, concurrency=3).map(complete, ["a"] * 9)
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    "fault",
    [
        Status(429),
        Status(429, headers={"Retry-After": "0"}),
        Status(500),
        Status(503, headers={"Retry-After": "soon"}),
        Status(408),
        Cut(),
        Reset(),
        Raw(b"<html>busy</html>", "text/html"),
        Raw(b"[1, 2]"),
        Raw(b"{}"),
        Raw(b'{"choices": []}'),
        Raw(b'{"choices": [{"index": 0}]}'),
        Raw(b'{"choices": [{"text": 3}]}'),
        Raw(b'{"choices": [{"text": "for chat"}], "message": 1}'),
        Raw(b'{"choices": [{"message": {"content": 3}}]}'),
        Raw(b'{"error": {"message": "out of memory"}}'),
        Raw(b"\xff\xfe\x00"),
        Raw(b""),
    ],
    ids=repr,
)
def test_a_passing_fault_is_retried(serve: Callable[..., OpenAIServer], fault: Fault) -> None:
    server = serve(faults=[fault, fault])
    made = client(server)
    (reply,) = made.map(chat if "message" in repr(fault) else complete, ["a"])
    assert reply.text == "fine"
    assert not reply.error
    assert len(server.requests) == 3
    assert (made.usage.requests, made.usage.retries, made.usage.failed) == (1, 2, 0)


@pytest.mark.parametrize("fault", [Hang(), Endless()])
def test_an_answer_that_does_not_end_is_given_up_in_time(serve: Callable[..., OpenAIServer], fault: Fault) -> None:
    server = serve(faults=[fault])
    begin = time.perf_counter()
    (reply,) = client(server, timeout=0.3).map(complete, ["a"])
    assert reply.text == "fine"
    assert 0.3 <= time.perf_counter() - begin < 5


def test_an_answer_too_large_is_given_up(serve: Callable[..., OpenAIServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepdpo_kernels.data.generation.openai_client.MAX_BYTES", 2**16)
    server = serve(faults=[Raw(b" " * 2**17)])
    (reply,) = client(server, retries=0).map(complete, ["a"])
    assert "more than 65536 bytes" in reply.error


def test_valid_json_of_another_content_type_is_an_answer(serve: Callable[..., OpenAIServer]) -> None:
    server = serve(faults=[Raw(b'{"choices": [{"text": "yes"}]}', "text/plain")])
    (reply,) = client(server, retries=0).map(complete, ["a"])
    assert reply.text == "yes"


def test_the_server_says_how_long_to_wait(serve: Callable[..., OpenAIServer]) -> None:
    server = serve(faults=[Status(429, headers={"Retry-After": "0.4"})])
    begin = time.perf_counter()
    client(server).map(complete, ["a"])
    assert 0.4 <= time.perf_counter() - begin < 4


@pytest.mark.parametrize(("value", "seconds"), [("3", 3), ("-3", 0), ("soon", None), ("", None)])
def test_seconds_to_wait(value: str, seconds: float | None) -> None:
    assert _retry_after({"retry-after": value}) == seconds


def test_dates_to_wait_for() -> None:
    in_an_hour = _retry_after({"retry-after": formatdate(time.time() + 3600, usegmt=True)})
    assert in_an_hour is not None
    assert 3000 <= in_an_hour <= 3600
    assert _retry_after({"retry-after": formatdate(time.time() - 3600)}) == 0


def test_the_server_cannot_ask_for_more_than_two_minutes(
    serve: Callable[..., OpenAIServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepdpo_kernels.data.generation.openai_client.LONGEST_WAIT", 0.1)
    server = serve(faults=[Status(429, headers={"Retry-After": "86400"})])
    begin = time.perf_counter()
    client(server).map(complete, ["a"])
    assert 0.1 <= time.perf_counter() - begin < 5


def test_waits_grow(serve: Callable[..., OpenAIServer]) -> None:
    server = serve(faults=[Status(500)] * 4)
    begin = time.perf_counter()
    client(server, backoff=0.04).map(complete, ["a"])
    assert 0.75 * 0.04 * 15 < time.perf_counter() - begin < 5


def test_after_the_last_try_the_reply_says_why(serve: Callable[..., OpenAIServer]) -> None:
    server = serve(lambda request: Status(500, "no luck") if request.body["prompt"] == "b" else "fine")
    made = client(server, retries=2)
    one, two, three = made.map(complete, ["a", "b", "c"])
    assert (one.text, two.text, three.text) == ("fine", "", "fine")
    assert two.error == "500: no luck (tried 3 times)"
    assert (made.usage.retries, made.usage.failed) == (2, 1)


def test_an_error_inside_a_status_of_200_is_told(serve: Callable[..., OpenAIServer]) -> None:
    server = serve(lambda request: Raw(b'{"error": {"message": "out of memory"}, "choices": [{"text": "a"}]}'))
    (reply,) = client(server, retries=0).map(complete, ["a"])
    assert reply.error == "the server failed: {'message': 'out of memory'} (tried 1 times)"


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refused_request_is_not_sent_again(serve: Callable[..., OpenAIServer], code: int) -> None:
    server = serve(lambda request: Status(code, "too long"))
    (reply,) = client(server).map(complete, ["a"])
    assert reply.error == f"{code}: too long"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "huge"}, ("'huge'", "404", "it has tiny")),
        ({"path": "/v2"}, ("/v2", "404", "/v1 at its end")),
        ({"fault": Status(401)}, ("refused", "no key: set OPENAI_API_KEY")),
        ({"fault": Status(403)}, ("refused", "no key: set OPENAI_API_KEY")),
        ({"fault": Status(429, error_code="insufficient_quota")}, ("no credit left",)),
    ],
)
def test_what_no_request_can_survive_ends_the_call(
    serve: Callable[..., OpenAIServer], options: dict[str, Any], says: tuple[str, ...]
) -> None:
    def answer(request: Request) -> Any:
        return options.get("fault", "fine")

    server = serve(answer)
    url = server.url.replace("/v1", options.get("path", "/v1"))
    made = OpenAIClient(url, options.get("model", "tiny"), concurrency=2, backoff=10.0)
    with pytest.raises(StepDPOError) as caught:
        made.map(complete, ["a"] * 50)
    for words in (url, *says):
        assert words in str(caught.value)
    assert len(server.requests) <= 2


def test_nobody_listens_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = OpenAIClient(f"http://user:hidden@127.0.0.1:{port}/v1?token=hidden", "tiny", backoff=10.0)
    with pytest.raises(StepDPOError, match="no server answers") as caught:
        made.map(complete, ["a"])
    assert f"http://127.0.0.1:{port}/v1" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_server_that_goes_away_ends_the_call() -> None:
    with OpenAIServer(lambda request: "fine") as server:
        made = client(server, retries=1)
        assert made.map(complete, ["a"])[0].text == "fine"
    with pytest.raises(StepDPOError, match=r"is gone .*tried 2 times"):
        made.map(complete, ["a"])


def test_an_exception_of_the_work_ends_the_call(serve: Callable[..., OpenAIServer]) -> None:
    server = serve()

    async def work(session: Session, item: int) -> None:
        await session.complete(prompt="a")
        if item == 3:
            raise KeyError(item)

    with pytest.raises(KeyError):
        client(server, concurrency=1).map(work, range(50))
    assert len(server.requests) == 4


def test_several_requests_for_one_item(serve: Callable[..., OpenAIServer]) -> None:
    async def work(session: Session, item: int) -> list[str]:
        return [(await complete(session, f"{item} {part}")).text for part in range(2)]

    assert client(serve(lambda request: request.body["prompt"])).map(work, range(3)) == [
        ["0 0", "0 1"],
        ["1 0", "1 1"],
        ["2 0", "2 1"],
    ]


def test_no_items_need_no_server() -> None:
    assert OpenAIClient("http://127.0.0.1:9/v1", "tiny").map(complete, []) == []


def test_works_inside_a_running_loop(serve: Callable[..., OpenAIServer]) -> None:
    made = client(serve())

    async def notebook() -> list[Reply]:
        return made.map(complete, ["a"])

    assert asyncio.run(notebook())[0].text == "fine"


def test_the_key_comes_from_the_environment(
    serve: Callable[..., OpenAIServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(key=KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", "wrong")
    assert client(server).map(complete, ["a"])[0].text == "fine"
    with pytest.raises(StepDPOError, match="refused the key in OTHER_KEY"):
        client(server, key_variable="OTHER_KEY").map(complete, ["a"])
    monkeypatch.delenv("OTHER_KEY")
    with pytest.raises(StepDPOError, match="OTHER_KEY, which is to hold the key, is not set"):
        client(server, key_variable="OTHER_KEY")


@pytest.mark.parametrize(
    "fault",
    [
        Status(400, f"bad {KEY}"),
        Status(401, f"bad {KEY}"),
        Status(404, f"bad {KEY}"),
        Status(429, f"bad {KEY}", error_code="insufficient_quota"),
        Status(500, f"bad {KEY}"),
        Raw(f'{{"error": "bad {KEY}"}}'.encode()),
        Raw(f'["{"x" * 270} {KEY}"]'.encode()),
        Raw(f"bad {KEY}".encode(), "text/html"),
        Hang(),
        Reset(),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_the_key_is_never_shown(
    serve: Callable[..., OpenAIServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    fault: Fault,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(lambda request: fault)
    made = client(server, retries=1, timeout=0.2)
    try:
        shown = repr(made.map(complete, ["a"]))
    except StepDPOError as error:
        shown = f"{error!r} {error.__cause__!r}"
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    captured = capfd.readouterr()
    for text in (shown, repr(made), str(vars(made)), caplog.text, captured.out, captured.err):
        assert KEY[:12] not in text


@pytest.mark.parametrize("key", ["sk\ninjected: yes", "schlüssel"])
def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(StepDPOError, match="OPENAI_API_KEY holds characters") as caught:
        OpenAIClient("http://127.0.0.1:9/v1", "tiny")
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "options", "says"),
    [
        ("localhost:8000", {}, "base_url"),
        ("ftp://localhost", {}, "base_url"),
        ("http://", {}, "base_url"),
        ("http://localhost:99999999", {}, "base_url"),
        ("http://localhost/v1", {"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ("http://localhost/v1", {"timeout": 0}, "timeout must be above 0, got 0"),
        ("http://localhost/v1", {"retries": -1}, "retries must be at least 0, got -1"),
        ("http://localhost/v1", {"backoff": -1.0}, r"backoff must be at least 0, got -1\.0"),
    ],
)
def test_options_that_make_no_sense(base_url: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(StepDPOError, match=says):
        OpenAIClient(base_url, "tiny", **options)


def test_connections_are_closed(serve: Callable[..., OpenAIServer], recwarn: pytest.WarningsRecorder) -> None:
    made = client(serve())
    made.map(complete, ["a"] * 4)
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]
