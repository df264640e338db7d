"""Tokens are drawn with the probabilities that were asked for."""

from __future__ import annotations

import pytest
import torch

from stepdpo_kernels.data.generation import sampler as module
from stepdpo_kernels.data.generation.sampler import SeededSampler

ROWS = 20_000
PROBS = torch.tensor([0.02, 0.3, 0.0, 0.4, 0.08, 0.15, 0.05])


def draw(scores: torch.Tensor, temperature: float, top_p: float, vocabulary: int = 7) -> torch.Tensor:
    made = SeededSampler(range(len(scores)), 1, temperature=temperature, top_p=top_p, vocabulary=vocabulary)
    chosen = made(torch.empty(len(scores), 0), scores)
    assert torch.equal(chosen.isfinite().sum(-1), torch.ones(len(scores), dtype=torch.int64))
    torch.testing.assert_close(made.logps()[:, 0], scores.log_softmax(-1).gather(-1, chosen.argmax(-1)[:, None])[:, 0])
    return chosen.argmax(-1)


@pytest.mark.parametrize("most_likely", [2, 1024])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.8, 0.41, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies(monkeypatch: pytest.MonkeyPatch, temperature: float, top_p: float, most_likely: int) -> None:
    monkeypatch.setattr(module, "MOST_LIKELY", most_likely)
    tokens = draw(PROBS.log().expand(ROWS, -1), temperature, top_p)
    probs = PROBS ** (1 / temperature)
    probs = probs / probs.sum()
    best, order = probs.sort(descending=True)
    allowed = order[: int((best.cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(probs)
    expected[allowed] = probs[allowed] / probs[allowed].sum()
    found = tokens.bincount(minlength=7) / ROWS
    assert torch.equal(found[expected == 0], torch.zeros(int((expected == 0).sum())))
    error = (expected * (1 - expected) / ROWS).sqrt()
    assert ((found - expected).abs() <= 4.5 * error).all()


def test_rows_whose_nucleus_is_larger_than_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, sharp = torch.zeros(500, 7), torch.tensor([9.0, 0, 0, 0, 0, 0, 0]).expand(500, -1)
    scores = torch.stack([flat, sharp], 1).flatten(0, 1)
    whole = draw(scores, 1.0, 0.9)
    monkeypatch.setattr(module, "MOST_LIKELY", 2)
    tokens = draw(scores, 1.0, 0.9)
    assert set(tokens[1::2].tolist()) == {0}
    assert len(set(tokens[::2].tolist())) == 7
    assert torch.equal(tokens[1::2], whole[1::2])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_tokens_beyond_the_vocabulary_are_never_chosen(temperature: float) -> None:
    scores = torch.tensor([0.0, 3.0, 1.0, 50.0]).expand(50, -1)
    tokens = draw(scores, temperature, 1.0, vocabulary=3)
    assert int(tokens.max()) < 3
    if temperature < 1:
        assert set(tokens.tolist()) == {1}


def test_a_row_draws_the_same_beside_others() -> None:
    scores = torch.randn(40, 7)
    whole = draw(scores, 0.8, 0.95)
    made = SeededSampler([7], 3, temperature=0.8, top_p=0.95, vocabulary=7)
    assert made(torch.empty(1, 0), scores[7:8]).argmax(-1) == whole[7]


def test_draws_of_a_row_differ() -> None:
    made = SeededSampler([3], 50, temperature=1.0, top_p=1.0, vocabulary=7)
    assert len({int(made(torch.empty(1, 0), torch.zeros(1, 7)).argmax(-1)) for _ in range(50)}) > 3
