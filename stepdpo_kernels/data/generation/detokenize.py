"""Token ids -> text, one token at a time, with the character at which each token ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 6  # tokens before the text: what a first token means may depend on them (its leading space)


class Detokenizer:
    """The text of the tokens added so far, without special tokens.

    A character whose bytes lie in several tokens appears with the last of them. Each token is decoded behind those
    before it, never alone, so that spaces between tokens are right.

    text:  str
    ends:  for each token, how many characters of `text` lie at or before its end
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._ids = list(prompt_ids[-CONTEXT:])
        self._from = 0  # decoded from here
        self._read = len(self._ids)  # what lies before is in `text`, or in the prompt
        self._before = self._decode(self._ids)
        self.text = ""
        self.ends: list[int] = []

    def add(self, token: int) -> str:
        """What the token adds to the text: "" while a character is incomplete, and for special tokens."""
        self._ids.append(token)
        decoded = self._decode(self._ids[self._from :])
        whole = decoded.rstrip("�")
        added = self._take(decoded) if whole == decoded else ""
        self.ends.append(len(self.text) + (0 if added else max(0, len(whole) - len(self._before))))
        return added

    def finish(self) -> None:
        """Adds what is left of an incomplete character, as the tokenizer writes it."""
        self._take(self._decode(self._ids[self._from :]))
        if self.ends:
            self.ends[-1] = len(self.text)

    def _take(self, decoded: str) -> str:
        added = decoded[len(self._before) :]
        if added:
            self.text += added
            self._from, self._read = self._read, len(self._ids)
            self._before = self._decode(self._ids[self._from :])
        return added

    def _decode(self, ids: list[int]) -> str:
        if self._backend is not None:  # many times faster, and free of the tokenizer's options for cleaning up
            return self._backend.decode(ids, skip_special_tokens=True)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
