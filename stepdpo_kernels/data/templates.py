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
    """Text before the problem, text after it, and what stands between the prompt and the first step.

    end: what ends an answer, where the format has a mark of its own; "" for the tokenizer's EOS
    """

    before: str
    after: str
    separator: str
    end: str = ""


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
        "<|im_end|>",
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
    before, after, *_ = TEMPLATES[template]
    return before + prompt + after


def separator(template: str) -> str:
    """What stands between a rendered prompt and the first step, where there is one."""
    return "" if template == "chat" else TEMPLATES[template].separator


def end_of_answer(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a model writes when its answer is complete: the end of the turn, or the tokenizer's EOS.

    With "chat", what the template puts after the assistant's words up to and with its first special token ("<|im_end|>"
    of "<|im_end|>\\n": generation stops there, so what follows is never the model's to write). Where the template marks
    no end, and with the fixed texts, the tokenizer's EOS; with "qwen2-boxed" the mark of its own format.
    Raises StepDPOError where there is none.
    """
    end = _end_of_turn(tokenizer) if template == "chat" else TEMPLATES[template].end
    end = end or str(tokenizer.eos_token or "")
    if not end:
        raise StepDPOError(
            f"unit 'solution' ends every solution, and {type(tokenizer).__name__} has no EOS token for template "
            f"{template!r}; set tokenizer.eos_token"
        )
    return end


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    words = "The answer is 7."
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": words}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    after = text[text.rfind(words) + len(words) :] if words in text else ""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    ends = [after.find(token) + len(token) for token in (*tokenizer.all_special_tokens, *added) if token in after]
    return after[: min(ends)] if ends else ""
