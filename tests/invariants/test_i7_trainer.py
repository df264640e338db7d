"""I7 in the trainer: an optimiser step does not depend on how its pairs were split into forward passes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from stepdpo_kernels.trainer import StepDPOTrainer
from tests.numerics import relative_error
from tests.trainer.training import losses, make_config, make_pairs, steps_of, watch, weights


class Gradients(TrainerCallback):
    """The gradients of every optimiser step, before clipping changed them (it is off here)."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def run(tiny_model, step_records, tiny_tokenizer, tmp_path) -> Callable[..., Any]:
    """run(name, **fields): (forward passes, losses, gradients of each step, weights) of two epochs of 22 pairs."""
    records = step_records(6, 4)[:22]
    for number, record in enumerate(records):
        record["weight"] = (1.0, 0.25, 3.0)[number % 3]
    pairs = make_pairs(records, tiny_tokenizer(), tmp_path)

    def start(name: str, **fields: Any) -> tuple[int, list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
        settings = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}
        config = make_config(tmp_path, output_dir=str(tmp_path / name), **settings | fields)
        gradients = Gradients()
        trainer = StepDPOTrainer(tiny_model(), config, pairs, callbacks=[gradients])
        seen = watch(trainer)
        trainer.train()
        assert sorted(chain(*steps_of(seen, 4, 22)[:6])) == list(range(22))
        return len(seen), losses(trainer), gradients.steps, weights(trainer.model)

    return start


@pytest.mark.parametrize("share", ["tree", "pair", "none"])
def test_i7_gradients_do_not_depend_on_the_budget_or_on_sharing(run, share):
    passes, plain_losses, plain_gradients, plain_weights = run("plain", share="tree", max_tokens_per_batch=8192)
    assert passes == len(plain_losses) == 12  # one forward pass a step; the last step of each epoch has two pairs
    fewest = {"tree": 110, "pair": 110, "none": 200}[share]
    for budget in (fewest, 8192):
        passes, run_losses, gradients, run_weights = run(f"{share}-{budget}", share=share, max_tokens_per_batch=budget)
        assert (passes > 30) == (budget == fewest)  # hardly more than a pair at a time
        assert run_losses == pytest.approx(plain_losses, abs=5e-6)
        for ours, plain in zip(gradients, plain_gradients, strict=True):
            assert ours.keys() == plain.keys()
            for name in plain:
                assert relative_error(ours[name], plain[name]) < 1e-5, name
        for name in plain_weights:
            torch.testing.assert_close(run_weights[name], plain_weights[name], rtol=0, atol=1e-6)


def test_i7_pairs_per_step_is_all_that_counts(run):
    """per_device_train_batch_size and gradient_accumulation_steps are two ways of writing it."""
    one = run("one", pairs_per_step=4)
    for name, batch, accumulation in (("two", 2, 2), ("three", 4, 1), ("four", 1, 4)):
        other = run(
            name,
            pairs_per_step=None,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        assert other[:2] == one[:2]
        assert all(torch.equal(one[3][key], other[3][key]) for key in one[3])


def test_i7_workers_of_the_dataloader_change_nothing(run):
    one, other = run("one"), run("other", dataloader_num_workers=1)
    assert other[:2] == one[:2]
    assert all(torch.equal(one[3][key], other[3][key]) for key in one[3])
