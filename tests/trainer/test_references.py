"""The ways of asking the reference: the same training, whichever is taken."""

from __future__ import annotations

import pytest
import torch

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.test_adapters import lora
from tests.trainer.training import assert_same_weights, entries, losses, weights


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("reference", ["adapter_off", "model"])
def test_in_every_step_as_once_before(tiny_model, pairs, config, tmp_path, reference, bf16):
    """Under autocast, too, which keeps weights that were cast without a gradient."""
    runs = []
    for mode in ("precomputed", reference):
        args = config(output_dir=str(tmp_path / mode), reference=mode, learning_rate=1e-2, bf16=bf16)
        adapter = lora() if reference == "adapter_off" else None
        trainer = StepDPOTrainer(tiny_model(), args, pairs, peft_config=adapter, eval_dataset=pairs[:7])
        trainer.train()
        runs.append((losses(trainer), trainer.evaluate()["eval_rewards/margins"], weights(trainer.model)))
    # The first epoch has the forests of the table; what is evaluated has not.
    assert runs[0][0] == runs[1][0]
    assert_same_weights(runs[0][2], runs[1][2])
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert runs[0][0][-1] < 0.68


def test_no_table_is_made_where_every_step_asks(tiny_model, pairs, config, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdpo_kernels.trainer.ref_logps.compute_ref_logps", None)
    trainer = StepDPOTrainer(tiny_model(), config(reference="adapter_off"), pairs, peft_config=lora())
    trainer.train()
    assert trainer.train_dataset.ref_logps is None
    assert entries(tmp_path / "cache") == []


def test_the_second_model_stays_as_it_was(tiny_model, pairs, config):
    model = tiny_model()
    before = weights(model)
    trainer = StepDPOTrainer(model, config(reference="model", learning_rate=1e-2), pairs)
    trainer.train()
    assert isinstance(trainer.ref_model, torch.nn.Module)
    assert trainer.ref_model is not model
    assert_same_weights({name: p.detach() for name, p in trainer.ref_model.named_parameters()}, before)
    assert not weights(trainer.ref_model)  # none is trained
    assert not torch.equal(next(iter(weights(model).values())), next(iter(before.values())))


def test_a_second_model_of_ones_own(tiny_model, pairs, config, tmp_path):
    runs = []
    for mode in ("precomputed", "model"):
        args = config(output_dir=str(tmp_path / mode), reference=mode)
        trainer = StepDPOTrainer(tiny_model(), args, pairs, ref_model=tiny_model(seed=3))
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert abs(runs[0][0] - 0.6931) > 1e-3


def test_new_evaluation_pairs_after_training(tiny_model, pairs, config):
    trainer = StepDPOTrainer(tiny_model(), config(reference="model", learning_rate=1e-2), pairs[:12])
    trainer.train()
    assert trainer.evaluate(pairs[12:])["eval_rewards/margins"] != 0


def test_another_reference_cannot_be_resumed(tiny_model, pairs, config):
    args = {"save_strategy": "steps", "save_steps": 2, "reference": "model"}
    StepDPOTrainer(tiny_model(), config(**args, max_steps=2), pairs).train()
    trainer = StepDPOTrainer(tiny_model(), config(**args), pairs, ref_model=tiny_model(seed=3))
    with pytest.raises(StepDPOError, match="that run began with other weights of the reference"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("adapter_off", {}, "reference='adapter_off' needs an adapter: pass a peft_config"),
        ("adapter_off", {"peft_config": True, "ref_model": True}, "ref_model: with reference='adapter_off'"),
        ("model", {"peft_config": True}, "reference='model' needs a ref_model where the model has an adapter"),
        ("model", {"ref_model": "itself"}, "ref_model: it is the model itself"),
    ],
)
def test_references_that_cannot_be(tiny_model, pairs, config, tmp_path, mode, options, message):
    model = tiny_model()
    if "peft_config" in options:
        options = options | {"peft_config": lora()}
    if "ref_model" in options:
        options = options | {"ref_model": model if options["ref_model"] == "itself" else tiny_model()}
    with pytest.raises(StepDPOError, match=message):
        StepDPOTrainer(model, config(reference=mode), pairs, **options)
    assert entries(tmp_path / "run") == []
