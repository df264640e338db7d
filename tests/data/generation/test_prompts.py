"""A prompt is what the trainer will meet: the same text, the same tokens, one BOS."""

from __future__ import annotations

from typing import Any

import pytest

from stepdpo_kernels.data.generation import Prompt
from stepdpo_kernels.data.generation.prompts import PromptRenderer, derive_seed
from stepdpo_kernels.data.records import StepRecord
from stepdpo_kernels.data.templates import TEMPLATE_NAMES
from stepdpo_kernels.data.tokenization import StepTokenizer
from stepdpo_kernels.types import StepDPOError

PROMPT = Prompt("How much is 2 + 2?", "Let's think step by step.\nStep 1:")


@pytest.fixture(params=["llama", "qwen2", "byte_level", "eos", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Any, byte_level: Any, metaspace: Any) -> Any:
    made = {"byte_level": byte_level(), "eos": byte_level(eos=True), "metaspace": metaspace}
    return made.get(request.param) or tiny_tokenizer(request.param)


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT._replace(begun="")])
def test_the_tokens_are_those_of_training(tokenizer: Any, template: str, prompt: Prompt) -> None:
    record = StepRecord("here", "id", "", 1.0, prompt.problem, prompt.begun, " We", " They")
    (trained,) = StepTokenizer(tokenizer, template=template, boundary="separate")([record])
    (ids,) = PromptRenderer(tokenizer, template).ids([prompt])
    assert ids == trained.prefix_ids


def test_a_chat_template_without_a_bos_gets_none(tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    record = StepRecord("here", "id", "", 1.0, *PROMPT, " We", " They")
    (trained,) = StepTokenizer(tokenizer, boundary="separate")([record])
    assert PromptRenderer(tokenizer).ids([PROMPT]) == [trained.prefix_ids]
    assert tokenizer.bos_token_id not in trained.prefix_ids


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_a_server_that_adds_a_bos_sees_the_same_tokens(tiny_tokenizer: Any, template: str) -> None:
    tokenizer = tiny_tokenizer("llama")
    renderer = PromptRenderer(tokenizer, template)
    (ids,) = renderer.ids([PROMPT])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer(renderer.served_text(PROMPT))["input_ids"] == ids


def test_text_without_a_tokenizer() -> None:
    assert PromptRenderer(None, "deepseek-math").text(Prompt("2 + 2?", "Step 1:")) == (
        "User: 2 + 2?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant: Step 1:"
    )
    with pytest.raises(StepDPOError, match="template 'chat' needs a tokenizer"):
        PromptRenderer(None, "chat")
    with pytest.raises(StepDPOError, match="template must be one of"):
        PromptRenderer(None, "other")


def test_no_prompts(tiny_tokenizer: Any) -> None:
    assert PromptRenderer(tiny_tokenizer()).ids([]) == []


@pytest.mark.parametrize(
    ("kind", "template", "ends"),
    [
        ("llama", "chat", {"</s>", "<|end|>"}),
        ("llama", "alpaca", {"</s>"}),
        ("qwen2", "chat", {"<|im_end|>"}),
        ("qwen2", "qwen2-boxed", {"<|im_end|>"}),
    ],
)
def test_the_tokens_that_end_an_answer(tiny_tokenizer: Any, kind: str, template: str, ends: set[str]) -> None:
    tokenizer = tiny_tokenizer(kind)
    assert PromptRenderer(tokenizer, template).end_ids() == {tokenizer.convert_tokens_to_ids(end) for end in ends}


def test_a_tokenizer_without_any_end(words: Any) -> None:
    assert PromptRenderer(words, "none").end_ids() == set()


def test_seeds_differ_by_seed_prompt_and_sample() -> None:
    seeds = {
        derive_seed(seed, Prompt(problem, begun), sample)
        for seed in range(4)
        for problem in ("a", "b", "ab")
        for begun in ("", "a", "b")
        for sample in range(4)
    }
    assert len(seeds) == 4 * 9 * 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, PROMPT, 0) == derive_seed(0, PROMPT, 0)
