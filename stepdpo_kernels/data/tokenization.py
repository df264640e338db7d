"""Prompt, earlier steps and two steps as text -> one shared prefix and two branches of token ids.

boundary="joint": prompt + steps + step is tokenised as one string, as the model would meet it, and cut by the offsets
of the tokens. A token that crosses the boundary ("Step 1: " + "We" -> " We") belongs to the branch. The prefix is the
longest run of tokens that both branches begin with and that ends at or before the boundary, so
prefix_ids + chosen_ids and prefix_ids + rejected_ids are exactly the two joint tokenisations. (The released trainer,
`stepdpo_trainer.py` of github.com/dvlab-research/Step-DPO, tokenises jointly too, but cuts at the token count of the
prefix alone, one token earlier where that does not match, and for each branch on its own.)

boundary="separate": prompt + steps and the step are tokenised each on its own and laid end to end. The boundary may
then fall between tokens that the model never sees side by side, and tokenizers of the SentencePiece family put a
space before the step.

Special tokens: those that the tokenizer itself puts before a text (BOS) stand once at the front, none with a chat
template, which writes its own. Those that it puts after a text (EOS) are left out: a step is not the end.

Unit "solution" (Rafailov et al. 2023, arXiv 2305.18290: DPO): the prefix is the prompt alone, a branch is a whole
solution, from the first step on, and the mark that ends it, once. The text before a step is the same in both units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepdpo_kernels.data.records import UNITS, StepRecord
from stepdpo_kernels.data.templates import check_template, end_of_answer, render_prompt, separator
from stepdpo_kernels.types import StepDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDARIES = ("joint", "separate")


class TokenizedStep(NamedTuple):
    """Token ids of the shared prefix and of the two branches."""

    prefix_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class _Texts(NamedTuple):
    """The text before the boundary, and the two texts after it."""

    prefix: str
    chosen: str
    rejected: str


class _Encoded(NamedTuple):
    """ids: token ids; ends: for each, how many characters of the text lie at or before its end."""

    ids: list[int]
    ends: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text; special: with what the tokenizer puts around it of its own accord."""
    encoded = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def special_lead(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The special tokens that the tokenizer puts before a text of its own accord, found out from `text`."""
    (bare,), (full,) = encode(tokenizer, [text]), encode(tokenizer, [text], special=True)
    starts = [i for i in range(len(full) - len(bare) + 1) if bare and full[i : i + len(bare)] == bare]
    bos = full[:1] if full[:1] == [tokenizer.bos_token_id] else []
    return full[: starts[-1]] if starts else bos


class StepTokenizer:
    """Tokenises records in batches with one tokenizer, prompt template, rule for the boundary and unit.

    Raises StepDPOError for an unknown template, boundary or unit, for template "chat" with a tokenizer that has no chat
    template, for boundary "joint" with a tokenizer that reports no offsets, and for unit "solution" where nothing ends
    one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "chat",
        boundary: str = "joint",
        unit: str = "step",
    ) -> None:
        check_template(template, tokenizer)
        for name, value, choices in (("boundary", boundary, BOUNDARIES), ("unit", unit, UNITS)):
            if value not in choices:
                raise StepDPOError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if boundary == "joint" and not getattr(tokenizer, "is_fast", False):
            raise StepDPOError(
                f"boundary 'joint' needs the offsets of the tokens, which {type(tokenizer).__name__} does not report; "
                "load the model's fast tokenizer, or choose boundary='separate'"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.boundary = boundary
        self.end = end_of_answer(template, tokenizer) if unit == "solution" else None
        self._lead: list[int] | None = [] if template == "chat" else None

    def __call__(self, records: Sequence[StepRecord]) -> list[TokenizedStep]:
        """In the order of the records. Nothing is ever truncated."""
        prompts = {
            prompt: render_prompt(prompt, self.template, self.tokenizer)
            for prompt in dict.fromkeys(record.prompt for record in records)
        }
        texts = [self._texts(prompts[record.prompt], record) for record in records]
        pairs = self._joint(texts) if self.boundary == "joint" else self._separate(texts)
        lead = self._special_lead(next((text.prefix for text in texts if text.prefix), ""))
        if not lead:
            return pairs
        return [p if p.prefix_ids[: len(lead)] == lead else p._replace(prefix_ids=lead + p.prefix_ids) for p in pairs]

    def _texts(self, prompt: str, record: StepRecord) -> _Texts:
        steps = record.initial_reason_steps
        before = separator(self.template) + steps if steps else ""
        if self.end is None:
            return _Texts(prompt + before, record.chosen, record.rejected)
        solutions = [text.removesuffix(self.end) for text in (record.chosen, record.rejected)]
        return _Texts(prompt, *(before + text + self.end for text in solutions))

    def _special_lead(self, text: str) -> list[int]:
        if self._lead is None:
            self._lead = special_lead(self.tokenizer, text)
        return self._lead

    def _ids(self, texts: Sequence[str]) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, encode(self.tokenizer, distinct), strict=True))

    def _encode(self, texts: Sequence[str]) -> dict[str, _Encoded]:
        distinct = list(dict.fromkeys(texts))
        encodings = self.tokenizer(
            distinct, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).encodings
        assert encodings is not None
        return {
            text: _Encoded(encoding.ids, [end for _, end in encoding.offsets])
            for text, encoding in zip(distinct, encodings, strict=True)
        }

    def _joint(self, texts: Sequence[_Texts]) -> list[TokenizedStep]:
        whole = [(prefix, prefix + chosen, prefix + rejected) for prefix, chosen, rejected in texts]
        encoded = self._encode([text for _, *both in whole for text in both])
        pairs = []
        for prefix, right, wrong in whole:
            a, b = encoded[right].ids, encoded[wrong].ids
            limit = min(self._cut(text, encoded[text], len(prefix)) for text in (right, wrong))
            shared = next((i for i in range(limit) if a[i] != b[i]), limit)
            pairs.append(TokenizedStep(a[:shared], a[shared:], b[shared:]))
        return pairs

    def _cut(self, text: str, encoded: _Encoded, boundary: int) -> int:
        """How many tokens lie wholly before character `boundary` of the text."""
        ids, ends = encoded
        count = next((i for i, end in enumerate(ends) if end > boundary), len(ends))
        if count and text[boundary : boundary + 1] == " ":
            count -= self._true_end(text, ids[count - 1], ends[count - 1]) > boundary
        return count

    def _true_end(self, text: str, token: int, end: int) -> int:
        """Byte-level tokenizers may leave the spaces that end a token out of its offsets (`trim_offsets`)."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        spaces = len(piece) - len(piece.rstrip("Ġ"))
        if end and text[end - 1] != " " and text[end : end + spaces] == " " * spaces:
            return end + spaces
        return end

    def _separate(self, texts: Sequence[_Texts]) -> list[TokenizedStep]:
        before = self._ids([text.prefix for text in texts])
        after = self._ids([text for _, *both in texts for text in both])
        return [TokenizedStep(before[prefix], after[chosen], after[rejected]) for prefix, chosen, rejected in texts]
