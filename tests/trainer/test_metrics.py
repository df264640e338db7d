"""What a run logs, against sums made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from stepdpo_kernels.data import StepPairDataset
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import make_pairs, steps_of, watch

METRICS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens/saved",
    "tokens/batch",
    "tokens/encoded",
    "pairs_per_second",
    "tokens_per_second",
}
SPEED = {"pairs_per_second", "tokens_per_second"}


@pytest.fixture
def weighted(step_records, tiny_tokenizer, tmp_path) -> StepPairDataset:
    """18 pairs, some of which count twice or not at all."""
    records = step_records(6, 3)
    for number, record in enumerate(records):
        record["weight"] = (1.0, 2.0, 0.0, 0.5, 1.0)[number % 5]
    return make_pairs(records, tiny_tokenizer(), tmp_path)


@torch.no_grad()
def plain_logps(model, pairs) -> torch.Tensor:  # (2, P)
    batch = padded_batch(pairs)
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return logps.sum(dim=1).view(2, -1)


def expected_metrics(model, reference, pairs, beta: float) -> dict[str, float]:
    """Of some pairs, from plain models."""
    logps, before = plain_logps(model, pairs), plain_logps(reference, pairs)
    chosen, rejected = beta * (logps - before)
    margins = chosen - rejected
    weight = torch.tensor([pair.weight for pair in pairs])
    means = {
        "loss": -(weight * torch.log(torch.sigmoid(margins))),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    return {name: float(values.mean()) for name, values in means.items()}


def saved(pairs, max_tokens: int, share: str = "tree") -> tuple[float, float]:
    batches = pack_pairs(pairs, max_tokens, share=share)
    packed = sum(batch.num_tokens for batch in batches)
    unshared = sum(2 * p.prefix_ids.size + p.chosen_ids.size + p.rejected_ids.size for p in pairs)
    return 1 - packed / unshared, packed / len(batches)


@pytest.mark.parametrize("share", ["tree", "none"])
def test_metrics_of_every_step(tiny_model, weighted, config, share):
    """With the learning rate at 0 the policy stays where it is, away from its reference."""
    args = config(learning_rate=0.0, beta=0.3, share=share)
    policy, reference = tiny_model(seed=1), tiny_model()
    trainer = StepDPOTrainer(policy, args, weighted, ref_model=reference)
    seen = watch(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = steps_of(seen, 4, len(weighted))
    assert [len(step) for step in steps] == [4, 4, 4, 4, 2]
    for entry, step in zip(logged, steps, strict=True):
        assert entry.keys() >= METRICS | {"learning_rate", "grad_norm", "epoch", "step"}
        pairs = [weighted[i] for i in step]
        for name, value in expected_metrics(policy, reference, pairs, 0.3).items():
            assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        assert (entry["tokens/saved"], entry["tokens/batch"]) == pytest.approx(saved(pairs, 250, share), rel=1e-6)
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-4)
        assert 0 < entry["pairs_per_second"] < 1e6
        encoded = sum(batch.num_tokens for batch in pack_pairs(pairs, 250, share=share))
        assert entry["tokens/encoded"] == encoded
        assert entry["tokens_per_second"] == pytest.approx(entry["pairs_per_second"] * encoded / len(pairs))
    assert len({entry["rewards/accuracies"] for entry in logged}) > 1


def test_metrics_between_two_logs_are_means_over_their_pairs(tiny_model, weighted, config):
    args = config(learning_rate=0.0, logging_steps=3, num_train_epochs=2)
    policy, reference = tiny_model(seed=1), tiny_model()
    trainer = StepDPOTrainer(policy, args, weighted, ref_model=reference)
    seen = watch(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = steps_of(seen, 4, len(weighted))
    assert [entry["step"] for entry in logged] == [3, 6, 9]
    for number, entry in enumerate(logged):
        pairs = [weighted[i] for step in steps[3 * number : 3 * number + 3] for i in step]
        expected = expected_metrics(policy, reference, pairs, 0.4)
        del expected["loss"]  # Trainer's: the mean over steps, of which the last of an epoch is short
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_evaluation_is_the_mean_over_all_its_pairs(tiny_model, weighted, config):
    """Also where the last batch is short, and with other packing than in training."""
    args = config(per_device_eval_batch_size=7)
    model = tiny_model()
    trainer = StepDPOTrainer(model, args, weighted[:8], eval_dataset=weighted)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2) * sum(p.weight for p in weighted) / 18)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics.keys() >= {f"eval_{name}" for name in METRICS} | {"eval_runtime", "epoch"}
    for name, value in expected_metrics(model, tiny_model(), list(weighted), 0.4).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert metrics["eval_rewards/margins"] > 0.1  # training did something
    tokens = [saved(weighted[i : i + 7], 250) for i in (0, 7, 14)]
    assert min(t[0] for t in tokens) < metrics["eval_tokens/saved"] < max(t[0] for t in tokens)


def test_evaluation_does_not_disturb_training(tiny_model, weighted, config, tmp_path):
    runs = []
    for name, fields in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True})):
        args = config(output_dir=str(tmp_path / name), **fields)
        trainer = StepDPOTrainer(tiny_model(), args, weighted, eval_dataset=weighted[:5])
        trainer.train()
        history = trainer.state.log_history
        runs.append([{n: e[n] for n in METRICS - SPEED} for e in history if "loss" in e])
        assert sum("eval_loss" in e for e in history) == (6 if fields else 0)
    assert runs[0] == runs[1]


def test_a_pair_of_weight_zero_moves_nothing(tiny_model, weighted, config):
    """Its log-probs are reported, but a step of such pairs alone has no gradient."""
    silent = StepDPOTrainer(
        tiny_model(), config(optim="sgd", learning_rate=0.1), StepPairDataset([p for p in weighted if p.weight == 0])
    )
    seen = watch(silent)
    silent.train()
    entry = silent.state.log_history[0]
    assert (entry["loss"], entry["grad_norm"]) == (0.0, 0.0)
    assert entry["logps/chosen"] < -1
    assert seen[0].batch.num_pairs > 0
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(parameter, silent.model.get_parameter(name)), name


def test_doubling_all_weights_doubles_loss_and_gradient(tiny_model, weighted, config, tmp_path):
    from dataclasses import replace

    entries = []
    for factor in (1.0, 2.0):
        pairs = StepPairDataset([replace(p, weight=factor * p.weight) for p in weighted])
        args = config(output_dir=str(tmp_path / f"run{factor}"), learning_rate=0.0)
        trainer = StepDPOTrainer(tiny_model(seed=1), args, pairs, ref_model=tiny_model())
        trainer.train()
        entries.append([e for e in trainer.state.log_history if "loss" in e])
    for one, two in zip(*entries, strict=True):
        assert two["loss"] == 2 * one["loss"]
        assert two["grad_norm"] == 2 * one["grad_norm"]
        assert two["rewards/margins"] == one["rewards/margins"]


def test_time_includes_packing(tiny_model, pairs, config, monkeypatch):
    import time

    trainer = StepDPOTrainer(tiny_model(), config(), pairs)
    collate = type(trainer.data_collator).__call__

    def slow(self, items):
        time.sleep(0.1)
        return collate(self, items)

    monkeypatch.setattr(type(trainer.data_collator), "__call__", slow)
    trainer.train()
    rates = [entry["pairs_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    # 4 pairs in at least 0.1 s; one batch is fetched ahead, so the last step waits for none.
    assert all(rate < 40 for rate in rates[:-1]), rates


def test_metrics_of_ones_own(tiny_model, weighted, config):
    """They see every pair in the order of the dataset, whatever order it was evaluated in, also while training."""
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        rewards, logps = prediction.predictions
        return {
            "widest": float((rewards[:, 0] - rewards[:, 1]).max()),
            "eval_already": 1.0,
            "worst": float(logps.min()),
        }

    model = tiny_model()
    args = config(per_device_eval_batch_size=7, eval_strategy="epoch", metric_for_best_model="eval_widest")
    trainer = StepDPOTrainer(model, args, weighted[:8], eval_dataset=weighted, compute_metrics=compute_metrics)
    trainer.train()
    (prediction,) = seen
    rewards, logps = prediction.predictions
    expected = plain_logps(model, weighted)
    np.testing.assert_allclose(logps, expected.T, rtol=1e-5)
    np.testing.assert_allclose(rewards, 0.4 * (expected - plain_logps(tiny_model(), weighted)).T, rtol=1e-3, atol=1e-4)
    assert prediction.label_ids.tolist() == [0] * len(weighted)
    (entry,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert entry["eval_widest"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).max())
    assert entry["eval_already"] == 1.0
    assert entry["eval_worst"] == pytest.approx(logps.min())


def test_predictions_are_those_of_an_evaluation(tiny_model, weighted, config):
    seen = []

    def see(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    trainer = StepDPOTrainer(tiny_model(), config(), weighted, eval_dataset=weighted[:6], compute_metrics=see)
    trainer.predict(weighted[:6])  # the policy is the reference still
    trainer.train()
    metrics = trainer.evaluate()
    output = trainer.predict(trainer.eval_dataset)
    assert np.array_equal(output.predictions, seen[1].predictions)
    assert output.predictions[0].any()
    assert np.array_equal(output.label_ids, np.zeros(6))
    assert output.metrics["test_loss"] == metrics["eval_loss"]
    with pytest.raises(StepDPOError, match="test_dataset: give it to StepDPOTrainer at the start"):
        trainer.predict(weighted[:5])
