"""The prompt texts that Step-DPO was trained with, and the tokenizer's own chat template.

The three fixed texts are data formats: the released models saw exactly these characters. Source: `train.py` of
github.com/dvlab-research/Step-DPO (Lai et al. 2024, arXiv 2406.18629). There the earlier steps follow the prompt
after a separator of the template's own, and only where there are any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stepdpo_kernels.types import StepDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptTemplate(NamedTuple):
    """Text before the problem, text after it, and what stands between the prompt and the first step."""

    before: str
    after: str
    separator: str


TEMPLATES = {
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n",
        "\n\n### Response:",
        "\n",
    ),
    "deepseek-math": PromptTemplate(
        "User: ",
        "\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:",
        " ",
    ),
    "qwen2-boxed": PromptTemplate(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n",
        "",
    ),
    "none": PromptTemplate("", "", ""),
}
TEMPLATE_NAMES = ("chat", *TEMPLATES)


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StepDPOError for an unknown name, and for "chat" with a tokenizer that has no chat template."""
    if template not in TEMPLATE_NAMES:
        raise StepDPOError(f"template must be one of {', '.join(TEMPLATE_NAMES)}; got {template!r}")
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise StepDPOError(
            f"template 'chat' needs a chat template and {type(tokenizer).__name__} has none; set "
            f"tokenizer.chat_template or choose one of {', '.join(TEMPLATES)}"
        )


def render_prompt(prompt: str, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The problem statement as the model sees it, up to where the answer begins."""
    if template == "chat":
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    before, after, _ = TEMPLATES[template]
    return before + prompt + after


def separator(template: str) -> str:
    """What stands between a rendered prompt and the first step, where there is one."""
    return "" if template == "chat" else TEMPLATES[template].separator
