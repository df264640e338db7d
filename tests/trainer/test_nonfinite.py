"""Losses and gradients that are not finite: the pairs are named, and the weights stay as they were."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import assert_same_weights, entries, losses, steps_of, watch, weights

BAD = 5  # the number of the pair


class Weights(TrainerCallback):
    """Copies of the weights at the end of each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append(weights(model))


def break_pair(trainer: StepDPOTrainer, number: int) -> None:
    """The log-probs of one pair overflow whenever it is trained on."""
    packed = trainer.loss.packed

    def overflowing(hidden, weight, batch, *args, **options):
        output = packed(hidden, weight, batch, *args, **options)
        if not torch.is_grad_enabled() or number not in batch.pair_index:
            return output
        margins = torch.where(batch.pair_index == number, float("nan"), output.margins)
        return output._replace(loss=output.loss * float("nan"), margins=margins)

    trainer.loss.packed = overflowing  # type: ignore[method-assign]


def break_gradient(trainer: StepDPOTrainer, step: int) -> None:
    """The gradient of one weight overflows in one step."""
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda g: g * (float("inf") if trainer.state.global_step == step - 1 else 1.0))


def test_a_loss_stops_the_run_before_the_weights_change(tiny_model, pairs, config, tmp_path):
    copies = Weights()
    trainer = StepDPOTrainer(tiny_model(), config(), pairs, callbacks=[copies])
    break_pair(trainer, BAD)
    seen = watch(trainer)
    with pytest.raises(StepDPOError) as raised:
        trainer.train()
    done = len(copies.after)
    message = str(raised.value)
    assert f"step {done + 1}: not finite: the log-probs of pair '{pairs[BAD].id}' are not finite" in message
    assert "on_nonfinite='skip'" in message
    assert BAD in {i for batch, _, training in seen if training for i in batch.pair_index.tolist()}
    assert done  # the order of this seed draws it later than in the first step
    assert_same_weights(weights(trainer.model), copies.after[-1])


def test_a_gradient_stops_the_run_and_the_last_checkpoint_serves(tiny_model, pairs, config, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer = StepDPOTrainer(tiny_model(), config(**args), pairs)
    seen = watch(trainer)
    break_gradient(trainer, step=3)
    with pytest.raises(StepDPOError) as raised:
        trainer.train()
    third = steps_of(seen, 4, len(pairs))[2]
    assert "step 3: not finite: every loss is finite but the gradient is not, in a step of pairs" in str(raised.value)
    assert all(repr(pairs[i].id) in str(raised.value) for i in third)
    assert {"checkpoint-1", "checkpoint-2"} <= set(entries(tmp_path / "run"))
    resumed = StepDPOTrainer(tiny_model(), config(**args), pairs)
    resumed.train(resume_from_checkpoint=True)
    undisturbed = StepDPOTrainer(tiny_model(), config(output_dir=str(tmp_path / "other")), pairs)
    undisturbed.train()
    assert_same_weights(weights(resumed.model), weights(undisturbed.model))


@pytest.mark.parametrize("logging_steps", [1, 6])
def test_a_skipped_step_changes_nothing(tiny_model, pairs, config, tmp_path, caplog, logging_steps):
    copies = Weights()
    args = config(on_nonfinite="skip", logging_steps=logging_steps, weight_decay=0.1, warmup_steps=0)
    trainer = StepDPOTrainer(tiny_model(), args, pairs, callbacks=[copies])
    break_pair(trainer, BAD)
    seen = watch(trainer)
    trainer.train()
    steps = steps_of(seen, 4, len(pairs))
    skipped = next(number for number, step in enumerate(steps) if BAD in step)
    assert 0 < skipped < 5
    for number in range(1, 6):
        same = all(torch.equal(copies.after[number][n], copies.after[number - 1][n]) for n in copies.after[0])
        assert same == (number == skipped)
    assert f"step {skipped + 1}: not finite: the log-probs of pair '{pairs[BAD].id}'" in caplog.text
    history = trainer.state.log_history
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert [entry["steps/skipped"] for entry in history if "steps/skipped" in entry] == [1]
    assert len(losses(trainer)) == (5 if logging_steps == 1 else 1)
    whole = [0.0] * 6  # the loss of each step, from its forward passes
    for batch, output, training in seen:
        if training:
            number = next(n for n, step in enumerate(steps) if int(batch.pair_index[0]) in step)
            whole[number] += output.loss.item()
    assert math.isnan(whole.pop(skipped))
    assert losses(trainer) == pytest.approx(whole if logging_steps == 1 else [sum(whole) / 5], rel=1e-5)


@pytest.mark.parametrize("logging_steps", [1, 6])
def test_a_skipped_gradient(tiny_model, pairs, config, logging_steps):
    """Its finite loss is in no log."""
    copies = Weights()
    args = config(on_nonfinite="skip", logging_steps=logging_steps)
    trainer = StepDPOTrainer(tiny_model(), args, pairs, callbacks=[copies])
    break_gradient(trainer, step=3)
    seen = watch(trainer)
    trainer.train()
    steps = [set(step) for step in steps_of(seen, 4, len(pairs))]
    taken = [
        sum(output.loss.item() for batch, output, _ in seen if set(batch.pair_index.tolist()) <= step) for step in steps
    ]
    del taken[2]
    assert losses(trainer) == pytest.approx(taken if logging_steps == 1 else [sum(taken) / 5], rel=1e-5)
    assert_same_weights(copies.after[2], copies.after[1])
    assert not torch.equal(copies.after[3]["lm_head.weight"], copies.after[2]["lm_head.weight"])
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_norm_that_nobody_knows(tiny_model, pairs, config, monkeypatch, tmp_path):
    """DeepSpeed computes none in float32 where it does not shard."""
    trained = StepDPOTrainer(tiny_model(), config(max_grad_norm=0), pairs)
    trained.train()
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *args, **options: None)
    without = StepDPOTrainer(tiny_model(), config(max_grad_norm=0, output_dir=str(tmp_path / "without")), pairs)
    without.train()
    assert_same_weights(weights(without.model), weights(trained.model))
    assert "grad_norm" not in without.state.log_history[0]


def test_weights_that_overflow_are_found_in_the_reference(tiny_model, pairs, config, tmp_path):
    """A token's embedding is infinite: the pairs that have it are named, and nothing is cached."""
    model = tiny_model()
    token = int(pairs[BAD].chosen_ids[0])
    having = [p for p in pairs if token in [*p.prefix_ids, *p.chosen_ids[:-1], *p.rejected_ids[:-1]]]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")
    trainer = StepDPOTrainer(model, config(), pairs)
    with pytest.raises(StepDPOError, match="train_dataset: the reference's log-probs of pair") as raised:
        trainer.train()
    assert all(repr(p.id) in str(raised.value) for p in having)
    assert having
    assert entries(tmp_path / "cache") == []
    assert entries(Path(trainer.args.output_dir)) == []
