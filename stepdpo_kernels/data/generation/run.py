"""One completion while its tokens come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stepdpo_kernels.data.generation.detokenize import Detokenizer
from stepdpo_kernels.data.generation.prompts import PromptRenderer, derive_seed
from stepdpo_kernels.data.generation.protocol import Completion, Prompt, Sampling


@dataclass
class Run:
    """One completion while it is generated. index: of its prompt; room: most tokens that it may have."""

    index: int
    seed: int
    prompt_ids: list[int]
    room: int
    stop: tuple[str, ...]
    detokenizer: Detokenizer
    finish: str = ""
    error: str = ""
    tokens: int = 0
    stopped_at: int | None = None
    logps: list[float] = field(default_factory=list)

    def add(self, token: int, ends: set[int]) -> None:
        """Takes the next token, until `finish` is set."""
        if self.finish:
            return
        if token in ends:
            self.finish = "stop"
            return
        self.tokens += 1
        added = self.detokenizer.add(token)
        if added and self.stop:
            text = self.detokenizer.text
            longest = max(map(len, self.stop))
            found = [text.find(stop, max(0, len(text) - len(added) - longest + 1)) for stop in self.stop]
            if max(found) >= 0:
                self.stopped_at = min(at for at in found if at >= 0)
                self.finish = "stop"
                return
        if self.tokens == self.room:
            self.finish = "length"

    def completion(self, with_logps: bool) -> Completion:
        logps = self.logps[: self.tokens]
        if not self.error and any(logp != logp for logp in self.logps[: self.tokens + 1]):
            self.error = "the model's logits are not finite"
        if self.error:
            return Completion("", "failed", self.error)
        if self.stopped_at is None:
            self.detokenizer.finish()
        text, ends = self.detokenizer.text, self.detokenizer.ends
        if self.stopped_at is not None:
            text, ends = cut(text, ends, self.stopped_at)
        if not with_logps:
            return Completion(text, self.finish)
        return Completion(text, self.finish, logps=tuple(logps[: len(ends)]), ends=tuple(ends))


def begin(prompts: Sequence[Prompt], sampling: Sampling, renderer: PromptRenderer, context: int | None) -> list[Run]:
    """The n runs of each prompt, in order; those whose prompt leaves no room in `context` tokens have an error."""
    assert renderer.tokenizer is not None
    runs = []
    for index, (prompt, ids) in enumerate(zip(prompts, renderer.ids(prompts), strict=True)):
        room = sampling.max_new_tokens if context is None else min(context - len(ids), sampling.max_new_tokens)
        error = "" if ids else "the prompt has no tokens"
        if room < 1:
            error = f"a prompt of {len(ids)} tokens leaves no room in a context of {context}"
        for sample in range(sampling.n):
            seed = derive_seed(sampling.seed, prompt, sample)
            text = Detokenizer(renderer.tokenizer, ids)
            runs.append(Run(index, seed, ids, room, sampling.stop, text, error=error))
    return runs


def end(runs: Sequence[Run], prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
    """The completions of the runs, by prompt."""
    completions: list[list[Completion]] = [[] for _ in prompts]
    for run in runs:
        completions[run.index].append(run.completion(sampling.logps))
    return completions


def cut(text: str, ends: Sequence[int], at: int) -> tuple[str, list[int]]:
    """The text up to character `at`, and the ends of the tokens that begin before it."""
    begins = [0, *ends][: len(ends)]
    return text[:at], [min(end, at) for begin, end in zip(begins, ends, strict=True) if begin < at]
