"""A prompt -> the text that a model continues, its token ids, and the seed of each of its completions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepdpo_kernels.data.generation.protocol import Prompt
from stepdpo_kernels.data.templates import TEMPLATES, check_template, end_of_answer, render_prompt, separator
from stepdpo_kernels.data.tokenization import encode, special_lead
from stepdpo_kernels.types import StepDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def derive_seed(seed: int, prompt: Prompt, sample: int) -> int:
    """0..2^31-1: the seed of one completion of a prompt, whatever else is generated beside it or was before."""
    parts = (seed, sample, *prompt)
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class PromptRenderer:
    """Renders prompts as the trainer does: the same text, and the same tokens before the boundary.

    template:   one of templates.TEMPLATE_NAMES
    tokenizer:  may be None, with a template other than "chat", where token ids are not asked for

    Raises StepDPOError for an unknown template, and for "chat" without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, template: str = "chat") -> None:
        if tokenizer is None and template == "chat":
            raise StepDPOError(
                f"template 'chat' needs a tokenizer with a chat template; give one, or choose one of "
                f"{', '.join(TEMPLATES)}"
            )
        check_template(template, tokenizer)
        self.tokenizer = tokenizer
        self.template = template

    def text(self, prompt: Prompt) -> str:
        """The prompt up to where the model goes on; its separator stands only before an answer that has begun."""
        rendered = render_prompt(prompt.problem, self.template, self.tokenizer)
        return rendered + (separator(self.template) + prompt.begun if prompt.begun else "")

    def ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's BOS once at the front (a chat template writes its own)."""
        assert self.tokenizer is not None
        texts = [self.text(prompt) for prompt in prompts]
        encoded = encode(self.tokenizer, texts) if texts else []
        lead = self._lead(texts)
        return [ids if ids[: len(lead)] == lead else lead + ids for ids in encoded]

    def served_text(self, prompt: Prompt) -> str:
        """The text for a server that puts the tokenizer's BOS before it: without the one that a chat template wrote."""
        text = self.text(prompt)
        if self.tokenizer is None:
            return text
        lead = special_lead(self.tokenizer, text)
        return text.removeprefix(str(self.tokenizer.decode(lead))) if lead else text

    def end_ids(self) -> set[int]:
        """The tokens with which an answer in this template ends: the tokenizer's EOS, the end of the turn."""
        assert self.tokenizer is not None
        ends = {self.tokenizer.eos_token_id} - {None}
        try:
            (mark,) = encode(self.tokenizer, [end_of_answer(self.template, self.tokenizer)])
        except StepDPOError:  # nothing marks the end
            return ends
        return ends | set(mark) if len(mark) == 1 else ends

    def _lead(self, texts: Sequence[str]) -> list[int]:
        assert self.tokenizer is not None
        text = next((text for text in texts if text), "")
        return [] if self.template == "chat" else special_lead(self.tokenizer, text)
