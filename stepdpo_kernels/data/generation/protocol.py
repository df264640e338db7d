"""What the pipeline and the evaluation ask of whatever generates text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from stepdpo_kernels.types import StepDPOError


class Prompt(NamedTuple):
    """problem: what the user says; begun: how the answer begins, which the model is to continue."""

    problem: str
    begun: str = ""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    n:               completions of each prompt
    temperature:     0 is greedy
    top_p:           nucleus (Holtzman et al. 2020, arXiv 1904.09751); 1 for none
    max_new_tokens:  most tokens of a completion
    stop:            texts that end a completion; they are not part of it
    seed:            the same seed, prompts and software give the same completions, where the generator can promise it;
                     other prompts under the same seed get other random numbers
    logps:           also report the log-prob of every token
    """

    n: int = 1
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int = 0
    logps: bool = False

    def __post_init__(self) -> None:
        for name, ok, must in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop", isinstance(self.stop, tuple) and all(self.stop), "a tuple of texts, none of them empty"),
        ):
            if not ok:
                raise StepDPOError(f"{name} must be {must}, got {getattr(self, name)!r}")
        if self.temperature == 0 and self.n > 1:
            raise StepDPOError(f"n is {self.n} at temperature 0: greedy completions are all the same")


@dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    text:     without the prompt, special tokens and the stop text
    finish:   "stop": ended by the model or a stop text; "length": cut off at max_new_tokens; "failed": nothing came
    error:    for "failed", why
    logps:    log-prob of each token at temperature 1 and without top_p, as the model itself gives it; None where the
              generator reports none
    ends:     for each token of `logps`, how many characters of `text` lie at or before its end. Tokens that hold
              nothing of the text but end it (EOS, the rest of a stop text) are in neither
    """

    text: str
    finish: str
    error: str = ""
    logps: tuple[float, ...] | None = None
    ends: tuple[int, ...] | None = None

    def logp(self, start: int, end: int) -> float | None:
        """Sum over the tokens that end in characters start..end (exclusive, inclusive) of `text`; None if unknown."""
        if self.logps is None or self.ends is None:
            return None
        return sum(logp for logp, at in zip(self.logps, self.ends, strict=True) if start < at <= end)


class Generator(Protocol):
    """Something that continues texts.

    name:  for records and messages, for example "transformers:Qwen/Qwen2-0.5B-Instruct"
    """

    name: str

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """n completions of each prompt, in order.

        One that cannot be had is a Completion of finish "failed", so that the others are not lost.
        Raises StepDPOError when none can be had: wrong address, no such model, refused key.
        """
        ...
