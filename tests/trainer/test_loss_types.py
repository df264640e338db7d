"""Every type of loss in a training run, against the formula on plain padded branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stepdpo_kernels.loss import LOSS_TYPES
from stepdpo_kernels.loss.reference import step_dpo_loss
from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import entries, losses, steps_of, watch

OPTIONS: list[dict[str, Any]] = [
    {"loss_type": "sigmoid", "label_smoothing": 0.1, "rpo_alpha": 0.5},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "hinge"},
    {"loss_type": "ipo", "rpo_alpha": 0.2},
    {"loss_type": "simpo"},
    {"loss_type": "simpo", "simpo_gamma": 1.4, "beta": 2.0, "rpo_alpha": 1.0},
    {"loss_type": "sft"},
    {"loss_type": ["sft", "ipo", "simpo", "sigmoid"], "loss_weights": [0.2, 0.5, 1.0, 0.8]},
]


def _logits_and_labels(model: Any, pairs: Any) -> tuple[Tensor, Tensor]:
    batch = padded_batch(pairs)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]


def _expected(model: Any, reference: Any, pairs: Any, options: dict[str, Any]) -> float:
    logits, labels = _logits_and_labels(model, pairs)
    refs = None
    if reference is not None:
        ref_logits, _ = _logits_and_labels(reference, pairs)
        each = torch.log_softmax(ref_logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        refs = (each * (labels != -100)).sum(dim=1)
    return step_dpo_loss(logits, labels, refs, **options).item()


def test_all_types_are_here() -> None:
    assert {options["loss_type"] for options in OPTIONS[:-1]} == set(LOSS_TYPES)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_of_a_run(options, tiny_model, pairs, config, tmp_path):
    """With the learning rate at 0 the policy stays where it is, away from its reference."""
    alone = options["loss_type"] in ("simpo", "sft")
    policy, reference = tiny_model(seed=1), None if alone else tiny_model()
    trainer = StepDPOTrainer(policy, config(learning_rate=0.0, **options), pairs[:12], ref_model=reference)
    seen = watch(trainer)
    trainer.train()
    steps = steps_of(seen, 4, 12)
    assert len(steps) == 3
    with torch.no_grad():
        expected = [_expected(policy, reference, [pairs[i] for i in step], options) for step in steps]
    assert losses(trainer) == pytest.approx(expected, rel=2e-4)
    assert bool(entries(tmp_path / "cache")) == (not alone)


def test_simpo_runs_no_reference(tiny_model, pairs, config, monkeypatch):
    monkeypatch.setattr("stepdpo_kernels.trainer.ref_logps.compute_ref_logps", None)
    trainer = StepDPOTrainer(tiny_model(), config(loss_type="simpo"), pairs[:8], eval_dataset=pairs[8:12])
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert trainer.train_dataset.ref_logps is None
    assert trainer.evaluate(pairs[12:16])["eval_loss"] > 0  # no reference to be gone


@pytest.mark.parametrize("options", [{"loss_type": "simpo"}, {"reference": "none"}], ids=str)
def test_a_reference_that_nobody_would_ask_is_refused(options, tiny_model, pairs, config, tmp_path):
    with pytest.raises(StepDPOError, match="ref_model: this loss has no reference"):
        StepDPOTrainer(tiny_model(), config(**options), pairs[:4], ref_model=tiny_model())
    assert entries(tmp_path / "run") == []
