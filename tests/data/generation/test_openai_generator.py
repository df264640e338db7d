"""What a server is asked, and what is made of its answer, over HTTP on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("openai")

from stepdpo_kernels.data.generation import Completion, Prompt, Sampling
from stepdpo_kernels.data.generation.openai_generator import OpenAIGenerator
from stepdpo_kernels.data.generation.openai_logprobs import read_logprobs
from stepdpo_kernels.types import StepDPOError
from tests.openai_server import Cut, Fault, Hang, OpenAIServer, Raw, Request, Reset, Status

PROMPTS = [Prompt("How much is 2 + 2?", "Step 1:"), Prompt("And 3 + 3?")]


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., OpenAIServer]]:
    with ExitStack() as stack:

        def start(answer: Callable[[Request], Any] = lambda request: " It is 4.", **options: Any) -> OpenAIServer:
            return stack.enter_context(OpenAIServer(answer, **options))

        yield start


def generator(server: OpenAIServer, **options: Any) -> OpenAIGenerator:
    return OpenAIGenerator(server.url, "tiny", **{"backoff": 0.01, "timeout": 10.0, "template": "alpaca", **options})


def test_completions_are_asked_for_by_text(serve: Callable[..., OpenAIServer]) -> None:
    server = serve()
    sampling = Sampling(n=2, temperature=0.7, top_p=0.9, max_new_tokens=30, stop=("\n\n", "Step 9"))
    found = generator(server).generate(PROMPTS, sampling)
    assert found == [[Completion(" It is 4.", "stop")] * 2] * 2
    bodies = [request.body for request in server.requests]
    assert {request.path for request in server.requests} == {"/v1/completions"}
    assert len({body["seed"] for body in bodies}) == 4
    for body in bodies:
        assert "logprobs" not in body
        assert "n" not in body
        assert [body[name] for name in ("model", "temperature", "top_p", "max_tokens", "stop")] == [
            "tiny",
            0.7,
            0.9,
            30,
            ["\n\n", "Step 9"],
        ]
        assert [body[name] for name in ("top_k", "min_p", "repetition_penalty")] == [-1, 0.0, 1.0]
    texts = sorted({body["prompt"] for body in bodies})
    assert texts[0].endswith("And 3 + 3?\n\n### Response:")
    assert texts[1].endswith("How much is 2 + 2?\n\n### Response:\nStep 1:")


def test_the_chat_template_without_the_bos_that_the_server_adds(
    serve: Callable[..., OpenAIServer], tiny_tokenizer: Any
) -> None:
    server = serve()
    tokenizer = tiny_tokenizer("llama")
    generator(server, tokenizer=tokenizer, template="chat").generate(PROMPTS[:1], Sampling())
    text = server.requests[0].body["prompt"]
    assert text == "<|user|>\nHow much is 2 + 2?<|end|>\n<|assistant|>\nStep 1:"
    assert tokenizer(text)["input_ids"].count(0) == 1


def test_a_chat_continues_the_begun_answer(serve: Callable[..., OpenAIServer]) -> None:
    server = serve()
    made = generator(server, api="chat", template="chat", concurrency=1)
    found = made.generate(PROMPTS, Sampling(logps=True))
    assert found == [[Completion(" It is 4.", "stop")]] * 2
    begun, plain = (request.body for request in server.requests)
    assert begun["messages"] == [
        {"role": "user", "content": "How much is 2 + 2?"},
        {"role": "assistant", "content": "Step 1:"},
    ]
    assert begun["continue_final_message"] is True
    assert begun["add_generation_prompt"] is False
    assert plain["messages"] == [{"role": "user", "content": "And 3 + 3?"}]
    assert "continue_final_message" not in plain
    assert begun["logprobs"] is plain["logprobs"] is True
    assert begun["top_k"] == -1


def test_no_fields_that_the_protocol_does_not_know(serve: Callable[..., OpenAIServer]) -> None:
    server = serve()
    generator(server, extra={}).generate(PROMPTS[:1], Sampling())
    assert set(server.requests[0].body) == {"model", "prompt", "temperature", "top_p", "max_tokens", "seed"}


def test_the_seed_is_of_the_completion_alone(serve: Callable[..., OpenAIServer]) -> None:
    def echo(request: Request) -> str:
        return f"{request.body['prompt'][-20:]} {request.body['seed']}"

    made = generator(serve(echo))
    whole = made.generate(PROMPTS, Sampling(n=3))
    assert made.generate(PROMPTS[1:], Sampling(n=2)) == [whole[1][:2]]
    assert made.generate(PROMPTS, Sampling(n=3)) == whole
    assert made.generate(PROMPTS[1:], Sampling(seed=1))[0][0] not in whole[1]


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ({"text": "a b", "finish_reason": "length"}, Completion("a b", "length")),
        ({"text": "a b", "finish_reason": "stop"}, Completion("a b", "stop")),
        ({"text": "a END b", "finish_reason": "length"}, Completion("a ", "stop")),
        ({"text": ""}, Completion("", "stop")),
        (
            {"text": "a", "finish_reason": "content_filter"},
            Completion("", "failed", "the server ended it: finish_reason is 'content_filter'"),
        ),
        (
            {"text": "a", "finish_reason": None},
            Completion("", "failed", "the server ended it: finish_reason is None"),
        ),
        (Status(400, "the prompt is too long"), Completion("", "failed", "400: the prompt is too long")),
        (Status(500, "no luck"), Completion("", "failed", "500: no luck (tried 2 times)")),
    ],
)
def test_answers(serve: Callable[..., OpenAIServer], answer: Any, completion: Completion) -> None:
    def of(request: Request) -> Any:
        return answer if "3 + 3" in request.body["prompt"] else "fine"

    found = generator(serve(of), retries=1).generate(PROMPTS, Sampling(stop=("END",)))
    assert found == [[Completion("fine", "stop")], [completion]]


def test_a_chat_without_content(serve: Callable[..., OpenAIServer]) -> None:
    server = serve(lambda request: {"text": None, "finish_reason": "length"})
    ((completion,),) = generator(server, api="chat", template="chat").generate(PROMPTS[:1], Sampling())
    assert completion == Completion("", "length")


def test_many_faults_on_the_way_lose_and_double_nothing(serve: Callable[..., OpenAIServer]) -> None:
    kinds: list[Fault] = [
        Status(429, headers={"Retry-After": "0"}),
        Status(500),
        Cut(),
        Reset(),
        Raw(b"<html>", "text/html"),
        Hang(),
    ]
    server = serve(lambda request: request.body["prompt"].split()[-3] + f" {request.body['seed']}", faults=kinds * 3)
    prompts = [Prompt(f"number {i} of many") for i in range(20)]
    made = generator(server, template="none", timeout=1.0)
    found = made.generate(prompts, Sampling(n=2))
    assert [each.text.split()[0] for pair in found for each in pair] == [str(i) for i in range(20) for _ in range(2)]
    assert len({each.text for pair in found for each in pair}) == 40
    assert made.client.usage.retries == 18


def test_a_server_that_knows_no_such_model(serve: Callable[..., OpenAIServer]) -> None:
    server = serve()
    with pytest.raises(StepDPOError, match="knows no model 'huge'"):
        OpenAIGenerator(server.url, "huge", template="none").generate(PROMPTS, Sampling())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"api": "responses"}, "api must be one of completions, chat; got 'responses'"),
        ({"api": "chat", "template": "alpaca"}, "api 'chat' uses the server's chat template"),
        ({"template": "chat"}, "template 'chat' needs a tokenizer"),
        ({"template": "other"}, "template must be one of"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(StepDPOError, match=says):
        OpenAIGenerator("http://127.0.0.1:9/v1", "tiny", **options)


def test_names() -> None:
    assert OpenAIGenerator("http://127.0.0.1:9/v1", "a/b", template="none").name == "openai:a/b"
    assert OpenAIGenerator("http://127.0.0.1:9/v1", "a/b", template="none", name="mine").name == "mine"


def test_logps_of_completions(serve: Callable[..., OpenAIServer]) -> None:
    logprobs = {"tokens": [" It", " is", " 4.", "\n"], "token_logprobs": [-1.0, -2.0, -3, -9.5], "text_offset": []}
    server = serve(lambda request: {"text": " It is 4.", "logprobs": logprobs})
    ((found,),) = generator(server).generate(PROMPTS[:1], Sampling(logps=True, stop=("\n", " 4")))
    assert server.requests[0].body["logprobs"] == 1
    assert found == Completion(" It is", "stop", logps=(-1.0, -2.0), ends=(3, 6))
    assert found.logp(3, 6) == -2.0


def chat(*tokens: Any) -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": -i, "bytes": data} for i, (token, data) in enumerate(tokens)]}


def legacy(*tokens: str) -> dict[str, Any]:
    return {"tokens": list(tokens), "token_logprobs": [-i for i in range(len(tokens))]}


E2 = "€".encode()
SMILE = "😀".encode()


@pytest.mark.parametrize(
    ("text", "logprobs", "ends"),
    [
        ("ab", legacy("a", "b"), (1, 2)),
        ("ab", chat(("a", [97]), ("b", [98])), (1, 2)),
        ("ab", chat(("a", None), ("b", None)), (1, 2)),
        # what ends the text is not of it
        ("ab", legacy("a", "b", "<|im_end|>"), (1, 2)),
        ("ab", legacy("a", "b", "\n", "Step"), (1, 2)),
        ("ab", legacy("a", "b", ""), (1, 2)),
        ("ab", legacy("a", "b\nSt", "ep"), (1, 2)),
        ("", legacy("</s>"), ()),
        # special tokens that the text leaves out, tokens without text
        ("ab", legacy("a", "<|x|>", "b"), (1, 1, 2)),
        ("ab", legacy("", "a", "", "b"), (0, 1, 1, 2)),
        # characters that are spread over tokens
        ("a€b", chat(("a", [97]), ("�", list(E2[:1])), ("�", list(E2[1:])), ("b", [98])), (1, 1, 2, 3)),
        ("a€b", legacy("a", r"bytes:\xe2", r"bytes:\x82\xac", "b"), (1, 1, 2, 3)),
        ("a€b", legacy("a", "<0xE2>", "<0x82>", "<0xAC>", "b"), (1, 1, 1, 2, 3)),
        ("a€b", legacy("a", "�", "�", "b"), (1, 1, 2, 3)),
        ("a€", legacy("a", "�", "�"), (1, 1, 2)),
        ("a😀😀b", legacy("a", "�", "�", "�", "�", "b"), (1, 1, 2, 2, 3, 4)),
        ("é€x", legacy("�", "�", "�", "", "x"), (0, 1, 1, 2, 3)),
        ("x😀", chat(("x", [120]), (" ", list(SMILE[:3])), ("", list(SMILE[3:]))), (1, 1, 2)),
        # SentencePiece tokens that were decoded alone
        (" It is", legacy("It", "is"), (3, 6)),
        # a text of which one character is the sign for an unknown one
        ("a�b", legacy("a", "�", "b"), (1, 2, 3)),
    ],
)
def test_ends_of_tokens(text: str, logprobs: dict[str, Any], ends: tuple[int, ...]) -> None:
    assert read_logprobs(logprobs, text) == (tuple(float(-i) for i in range(len(ends))), ends)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"tokens": None, "token_logprobs": None},
        legacy("a", "c"),
        legacy("a"),
        {"tokens": ["a", "b"], "token_logprobs": [-1.0]},
        {"tokens": ["a", "b"], "token_logprobs": [None, -1.0]},
        {"content": [{"token": "a"}]},
        {"content": "ab"},
        [1],
    ],
)
def test_logprobs_that_cannot_be_read(logprobs: Any) -> None:
    assert read_logprobs(logprobs, "ab") is None
