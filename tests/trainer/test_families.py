"""Training models of other families: what their logits become, and models that the tests do not cover."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError, StepPair
from tests.exactness import plain_step
from tests.families import FAMILIES
from tests.model.test_support import small_model
from tests.trainer.training import entries, losses, watch


@pytest.mark.parametrize("kind", ["gemma2", "granite", "gpt_oss"])
def test_a_step_is_the_plain_models(tiny_model, pairs, config, kind):
    some = list(pairs)[:4]
    trainer = StepDPOTrainer(
        tiny_model(kind, vocab_size=600, **FAMILIES[kind].config), config(max_steps=2, learning_rate=1e-2), some
    )
    seen = watch(trainer)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)
    refs = torch.zeros(8)
    for batch, output, _ in seen[: len(seen) // 2]:
        refs[batch.pair_index], refs[4 + batch.pair_index] = output.chosen_logps, output.rejected_logps
    fresh = tiny_model(kind, vocab_size=600, **FAMILIES[kind].config)
    assert plain_step(fresh, some, refs).loss == pytest.approx(0.693147, abs=1e-5)
    assert plain_step(trainer.model, some, refs).loss < losses(trainer)[1]


def test_a_reference_with_other_logits_is_refused(tiny_model, pairs, config, tmp_path):
    model, ref_model = (tiny_model("granite", vocab_size=600, logits_scaling=s) for s in (2.0, 3.0))
    with pytest.raises(StepDPOError, match=r"ref_model: its logits are transformed by .*they are not of one family"):
        StepDPOTrainer(model, config(), pairs, ref_model=ref_model)
    assert entries(tmp_path) == ["pairs.jsonl"]


def test_an_untested_model_trains_after_a_comparison(pairs, config):
    trainer = StepDPOTrainer(small_model("gpt_neox", vocab_size=600), config(), pairs)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)


def test_an_untested_model_that_differs_is_refused_before_anything_is_written(pairs, config, tmp_path):
    trainer = StepDPOTrainer(small_model("stablelm", vocab_size=600), config(), pairs)
    with pytest.raises(StepDPOError, match="was not given the packing plan"):
        trainer.train()
    assert entries(tmp_path) == ["pairs.jsonl", "run"]
    assert entries(tmp_path / "run") == []


@pytest.mark.parametrize(("wanted", "expected"), [(None, 0), (True, 1), (False, 0)])
def test_the_comparison_can_be_asked_for(tiny_model, pairs, config, monkeypatch, wanted, expected):
    calls: list[Any] = []

    def counted(model: Any, batch: Any) -> bool:
        calls.append(batch)
        return True

    monkeypatch.setattr("stepdpo_kernels.model.forward.verify_first_batch", counted)
    StepDPOTrainer(tiny_model(), config(verify_first_batch=wanted, max_steps=2), pairs).train()
    assert len(calls) == expected


def test_a_pair_beyond_a_bounded_rotary_embedding_is_refused(tiny_model, config):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=16)
    fits, long = (
        StepPair(range(3, 15), [4, 5, 6, 7, 8], [9]),
        StepPair(range(3, 15), [4], [5, 6, 7, 8, 9, 10], id="long"),
    )
    StepDPOTrainer(model, config(), [fits])
    with pytest.raises(
        StepDPOError, match=r"train_dataset: pair 'long' has a branch of 17 encoded tokens, .* beyond 16"
    ):
        StepDPOTrainer(model, config(), [fits, long])
