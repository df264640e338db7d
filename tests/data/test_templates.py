"""The prompt texts are data formats: every character counts."""

from __future__ import annotations

from typing import Any

import pytest

from stepdpo_kernels.data.records import StepRecord
from stepdpo_kernels.data.tokenization import StepTokenizer
from stepdpo_kernels.types import StepDPOError

PROMPT = "What is {2} + 2?"
EXPECTED = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "What is {2} + 2?\n"
        "\n"
        "### Response:",
        "\n",
    ),
    "deepseek-math": (
        "User: What is {2} + 2?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:",
        " ",
    ),
    "qwen2-boxed": (
        "<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "What is {2} + 2?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "",
    ),
    "none": (PROMPT, ""),
    "chat": ("<|im_start|>user\nWhat is {2} + 2?<|im_end|>\n<|im_start|>assistant\n", ""),
}


@pytest.mark.parametrize("template", EXPECTED)
def test_prompt_text(template: str, tiny_tokenizer: Any):
    tokenizer = tiny_tokenizer("qwen2")
    text, separator = EXPECTED[template]
    with_steps, without = StepTokenizer(tokenizer, template=template)(
        [
            StepRecord("here", "a", "", 1.0, PROMPT, "Step 1: 2\nStep 2:", " 4", " 5"),
            StepRecord("here", "b", "", 1.0, PROMPT, "", "Step 1: 4", "Step 1: 5"),
        ]
    )
    assert tokenizer.decode(with_steps.prefix_ids + with_steps.chosen_ids) == text + separator + "Step 1: 2\nStep 2: 4"
    assert tokenizer.decode(without.prefix_ids + without.rejected_ids) == text + "Step 1: 5"


def test_unknown_template(tiny_tokenizer: Any):
    with pytest.raises(StepDPOError, match=r"template must be one of chat, alpaca, .*; got 'vicuna'"):
        StepTokenizer(tiny_tokenizer("qwen2"), template="vicuna")


def test_unknown_boundary(tiny_tokenizer: Any):
    with pytest.raises(StepDPOError, match="boundary must be one of joint, separate; got 'exact'"):
        StepTokenizer(tiny_tokenizer("qwen2"), boundary="exact")


def test_no_chat_template(tiny_tokenizer: Any):
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = None
    with pytest.raises(StepDPOError, match=r"needs a chat template and \w+ has none; set tokenizer.chat_template or"):
        StepTokenizer(tokenizer)
