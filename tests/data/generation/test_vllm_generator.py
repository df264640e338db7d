"""How vLLM is called and its answers read, by a stand-in that answers as vLLM's documentation says."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stepdpo_kernels.data.generation import Completion, Prompt, Sampling
from stepdpo_kernels.data.generation.prompts import PromptRenderer, derive_seed
from stepdpo_kernels.data.generation.vllm_generator import VLLMGenerator
from stepdpo_kernels.types import StepDPOError

PROMPTS = [Prompt("How much is 2 + 2?", "Step 1:"), Prompt("And 3 + 3?")]


class Recorder(ModuleType):
    """The module vllm, as far as it is used. answer: (token ids, finish_reason, stop_reason) of every completion."""

    def __init__(self, tokenizer: Any, answer: tuple[list[int], str, Any], max_model_len: int = 512) -> None:
        super().__init__("vllm")
        self.options: dict[str, Any] = {}
        self.calls: list[tuple[list[Any], list[Any]]] = []
        recorder = self

        class LLM:
            def __init__(self, **options: Any) -> None:
                recorder.options = options
                model_config = SimpleNamespace(max_model_len=max_model_len)
                self.llm_engine = SimpleNamespace(model_config=model_config)

            def get_tokenizer(self) -> Any:
                return tokenizer

            def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
                recorder.calls.append((prompts, params))
                return [recorder.output(each, *answer) for each in params]

        self.LLM = LLM
        self.SamplingParams = SimpleNamespace

    def output(self, params: Any, ids: list[int], finish: str, stop: Any) -> Any:
        logprobs = None
        if params.logprobs is not None:
            logprobs = [{token: SimpleNamespace(logprob=-float(i), rank=1)} for i, token in enumerate(ids)]
        completion = SimpleNamespace(token_ids=ids, finish_reason=finish, stop_reason=stop, logprobs=logprobs)
        return SimpleNamespace(outputs=[completion])


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> Any:
    def put(text: str, finish: str, stop: Any = None, more: tuple[int, ...] = (), **options: Any) -> Recorder:
        tokenizer = tiny_tokenizer("llama")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        recorder = Recorder(tokenizer, ([*ids, *more], finish, stop), **options)
        monkeypatch.setitem(sys.modules, "vllm", recorder)
        return recorder

    return put


def test_what_it_is_asked(install: Any, tiny_tokenizer: Any) -> None:
    recorder = install(" We add.", "length")
    made = VLLMGenerator("a/b", dtype="bfloat16")
    assert made.name == "vllm:a/b"
    assert recorder.options == {"model": "a/b", "dtype": "bfloat16", "logprobs_mode": "raw_logprobs"}
    sampling = Sampling(n=2, temperature=0.7, top_p=0.9, max_new_tokens=30, stop=("\n\n",), seed=5)
    found = made.generate(PROMPTS, sampling)
    assert found == [[Completion(" We add.", "length")] * 2] * 2
    ((prompts, params),) = recorder.calls
    tokenizer = tiny_tokenizer("llama")
    ids = PromptRenderer(tokenizer).ids(PROMPTS)
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [ids[0], ids[0], ids[1], ids[1]]
    assert [each.seed for each in params] == [derive_seed(5, prompt, i) for prompt in PROMPTS for i in range(2)]
    ends = sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"]))
    for each in params:
        assert vars(each) == {
            "n": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": each.seed,
            "max_tokens": 30,
            "stop": ["\n\n"],
            "stop_token_ids": ends,
            "logprobs": None,
        }


@pytest.mark.parametrize(
    ("text", "finish", "stop", "more", "completion"),
    [
        (" We add.", "length", None, (), Completion(" We add.", "length")),
        (" We add.", "stop", None, (1,), Completion(" We add.", "stop")),  # EOS
        (" We add.", "stop", 6, (6,), Completion(" We add.", "stop")),  # a stop token
        (" We add.", "stop", 300, (300,), Completion(" We add.", "stop")),  # an end token of the model's own
        (" We add.\nStep 2", "stop", "\nStep", (), Completion(" We add.", "stop")),
        (" We add.", "abort", None, (), Completion("", "failed", "vLLM ended it: abort")),
    ],
)
def test_what_it_answers(install: Any, text: str, finish: str, stop: Any, more: Any, completion: Completion) -> None:
    install(text, finish, stop, more)
    sampling = Sampling(max_new_tokens=40, stop=("\nStep",))
    assert VLLMGenerator("a/b").generate(PROMPTS[:1], sampling) == [[completion]]


def test_logps(install: Any, tiny_tokenizer: Any) -> None:
    recorder = install(" 12 €", "stop", None, (1,))
    ((found,),) = VLLMGenerator("a/b").generate(PROMPTS[:1], Sampling(max_new_tokens=40, logps=True))
    count = len(tiny_tokenizer("llama")(" 12 €", add_special_tokens=False)["input_ids"])
    assert recorder.calls[0][1][0].logprobs == 0
    assert found.logps == tuple(-float(i) for i in range(count))
    assert found.ends is not None
    assert found.ends[-3:] == (4, 4, 5)


def test_a_prompt_that_does_not_fit_is_not_sent(install: Any, tiny_tokenizer: Any) -> None:
    lengths = [len(ids) for ids in PromptRenderer(tiny_tokenizer("llama")).ids(PROMPTS)]
    recorder = install(".", "length", max_model_len=min(lengths) + 1)
    made = VLLMGenerator("a/b")
    found = dict(zip(lengths, made.generate(PROMPTS, Sampling(max_new_tokens=9)), strict=True))
    assert found[min(lengths)] == [Completion(".", "length")]
    assert "leaves no room" in found[max(lengths)][0].error
    ((prompts, params),) = recorder.calls
    assert len(prompts) == 1
    assert params[0].max_tokens == 1
    made.generate([], Sampling())
    assert len(recorder.calls) == 1


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(StepDPOError, match=r"vLLM is not installed: pip install 'stepdpo-kernels\[vllm\]'"):
        VLLMGenerator("a/b")
