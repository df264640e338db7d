"""Sampling where each completion has random numbers of its own, so that its neighbours in the batch do not matter.

A token is the inverse of the cumulated probabilities at one uniform number, and that number depends only on the
completion's seed and the token's place in it. The generators of torch are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

MOST_LIKELY = 1024  # tokens that are looked at first for the nucleus; nearly always they hold it


class SeededSampler(LogitsProcessor):
    """Chooses the next token of each row of a batch, and leaves `generate` only that one to choose.

    seeds:        one for each row
    steps:        most tokens of a row
    temperature:  0 is greedy
    top_p:        the smallest set of most likely tokens of at least this probability (after the temperature)
    vocabulary:   tokens from here on are rows of the head that stand for nothing; they are never chosen
    """

    def __init__(self, seeds: Sequence[int], steps: int, *, temperature: float, top_p: float, vocabulary: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.vocabulary = vocabulary
        self.draws: Tensor | None = None  # (rows, steps) float32 in (0, 1]
        if temperature:
            streams = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
            self.draws = torch.from_numpy(1 - np.stack([s.random(steps, dtype=np.float32) for s in streams]))
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (rows, V) float32: the model's logits -> as many, 0 for one token of a row, else -inf."""
        logsumexp = scores.logsumexp(-1)  # (rows,)
        known = scores[:, : self.vocabulary]
        tokens = (known.argmax(-1) if self.draws is None else self._draw(known))[:, None]  # (rows, 1)
        self._logps.append(scores.gather(-1, tokens)[:, 0] - logsumexp)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)

    def logps(self) -> Tensor:
        """(rows, tokens so far) float32 on the CPU: log-probs of the chosen tokens, at temperature 1 and no top_p."""
        return torch.stack(self._logps, -1).cpu()

    def _draw(self, scores: Tensor) -> Tensor:
        assert self.draws is not None
        self.draws = self.draws.to(scores.device)
        draws = self.draws[:, len(self._logps), None].contiguous()  # (rows, 1)
        relative = scores - scores.amax(-1, keepdim=True)  # so that no temperature is too small
        probs = (relative / self.temperature).softmax(-1)  # (rows, V)
        if self.top_p == 1:
            return _at(probs.cumsum(-1), draws, None)
        best, order = probs.topk(min(MOST_LIKELY, probs.shape[-1]))  # (rows, k)
        tokens = order.gather(-1, _at(best.cumsum(-1), draws, self.top_p)[:, None])[:, 0]
        flat = best.sum(-1) < self.top_p  # the rows whose nucleus is larger
        if bool(flat.any()):
            best, order = probs[flat].sort(-1, descending=True)
            tokens[flat] = order.gather(-1, _at(best.cumsum(-1), draws[flat], self.top_p)[:, None])[:, 0]
        return tokens


def _at(cumulated: Tensor, draws: Tensor, top_p: float | None) -> Tensor:
    """(rows,): the first index whose cumulated probability reaches the draw's share of what is allowed."""
    last = torch.full_like(draws, cumulated.shape[-1] - 1, dtype=torch.int64)  # (rows, 1)
    if top_p is not None:
        last = torch.minimum(last, (cumulated < top_p).sum(-1, keepdim=True))
    share = draws * cumulated.gather(-1, last)
    return torch.minimum(torch.searchsorted(cumulated, share), last)[:, 0]
