"""Thirty optimiser steps against the trajectory that is stored beside this file, and against TRL's DPOTrainer.

Model and pairs are made of numbers of `numpy.random.RandomState`, whose streams are frozen, so nothing here depends on
how a library initialises or tokenises. `python -m tests.trainer.test_golden_losses` writes golden_losses.json anew;
whoever does that should know why the losses have changed.

How close: losses to 1e-6 of their value, margins to 1e-6 in units of reward. A margin is a difference of sums of about
10 nats, each rounded to float32, so its error does not shrink with it. Measured: other vector instructions (SSE4.2 to
AVX-512), numbers of threads, `share` and implementations move a loss by at most 5e-7 of it and a margin by at most
6e-7 in these thirty steps, TRL's trainer is 6e-7 and 6e-7 away, and the least of the differences below 1.6e-2.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer
from stepdpo_kernels.types import StepPair
from tests.families import tiny_model
from tests.forests import make_pair
from tests.trainer.training import watch

STORED = Path(__file__).with_name("golden_losses.json")
V, STEPS, PAIRS_PER_STEP = 32, 30, 8
COLUMNS = {"prompt_ids": "prefix_ids", "chosen_ids": "chosen_ids", "rejected_ids": "rejected_ids"}  # of TRL
# What both trainers are told. 44 pairs are six steps an epoch, the last of four pairs.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": PAIRS_PER_STEP,
    "gradient_accumulation_steps": 1,
    "beta": 0.4,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}


def golden_pairs() -> list[StepPair]:
    """44 pairs, four of each problem: prefixes nest, steps have 1 to 5 tokens."""
    rng = np.random.RandomState(0)

    def tokens(least: int, most: int) -> list[int]:
        return rng.randint(3, V, rng.randint(least, most + 1)).tolist()

    pairs: list[StepPair] = []
    for problem in range(11):
        prefix = tokens(8, 14)
        for _ in range(4):
            chosen = tokens(1, 5)
            pairs.append(make_pair(prefix, chosen, tokens(1, 5), id=str(len(pairs)), group=str(problem)))
            prefix = prefix + chosen
    return pairs


def golden_model() -> Any:
    """A Llama of two layers and about 20,000 weights, in float32."""
    model = tiny_model("llama", vocab_size=V, hidden_size=32, intermediate_size=64)
    rng = np.random.RandomState(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            drawn = torch.from_numpy(rng.standard_normal(tuple(weight.shape))).float()
            weight.copy_(0.15 * drawn if weight.ndim > 1 else 1 + 0.1 * drawn)
    return model


def config_of(folder: Path, **options: Any) -> StepDPOConfig:
    cache = str(folder / "cache")
    settings = {**SETTINGS, "max_tokens_per_batch": 40, "reference_cache_dir": cache, **options}
    return StepDPOConfig(output_dir=str(folder / "run"), **settings)


def trajectory(trainer: Any) -> dict[str, list[float]]:
    """Losses and mean margins of the steps of a run."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    return {"losses": [entry["loss"] for entry in logs], "margins": [entry["rewards/margins"] for entry in logs]}


def assert_same(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6, abs=0)
    assert ours["margins"] == pytest.approx(theirs["margins"], rel=1e-6, abs=1e-6)


def test_thirty_steps_are_the_stored_ones(tmp_path: Path) -> None:
    trainer = StepDPOTrainer(golden_model(), config_of(tmp_path), golden_pairs())
    seen = watch(trainer)
    ours = trajectory(trainer)
    assert len(ours["losses"]) == STEPS
    assert len(seen) > STEPS  # steps of several forests
    assert_same(ours, json.loads(STORED.read_text()))


def test_thirty_steps_are_those_of_trl(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    """TRL gets the tokens of the pairs: `_prepare_dataset` would tokenise texts and end each with an EOS."""
    pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    rows = [{name: getattr(pair, field).tolist() for name, field in COLUMNS.items()} for pair in golden_pairs()]
    trainer = OnTokens(
        golden_model(),
        ref_model=golden_model(),
        args=DPOConfig(str(tmp_path / "trl"), max_length=None, gradient_checkpointing=False, **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),  # of which it takes the padding
    )
    theirs = trajectory(trainer)
    ours = StepDPOTrainer(golden_model(), config_of(tmp_path), golden_pairs())
    assert_same(trajectory(ours), theirs)
    weights = [torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (ours, trainer)]
    assert torch.dist(*weights) < 1e-6 * weights[1].norm()


def _swapped(pairs: list[StepPair]) -> list[StepPair]:
    return [pairs[PAIRS_PER_STEP], *pairs[1:PAIRS_PER_STEP], pairs[0], *pairs[PAIRS_PER_STEP + 1 :]]


def _one_token(pairs: list[StepPair]) -> list[StepPair]:
    ids = pairs[5].rejected_ids.copy()
    ids[-1] = 3 + (ids[-1] - 2) % (V - 3)
    return [*pairs[:5], replace(pairs[5], rejected_ids=ids), *pairs[6:]]


def _with_eos(pairs: list[StepPair]) -> list[StepPair]:
    return [replace(p, chosen_ids=np.append(p.chosen_ids, 1), rejected_ids=np.append(p.rejected_ids, 1)) for p in pairs]


@pytest.mark.parametrize(
    ("change", "options"),
    [
        pytest.param(_swapped, {}, id="order"),
        pytest.param(_one_token, {}, id="token"),
        pytest.param(_with_eos, {}, id="eos"),
        pytest.param(list, {"beta": 0.41}, id="beta"),
        pytest.param(list, {"warmup_steps": 0.2}, id="schedule"),
    ],
)
def test_a_difference_shows(tmp_path: Path, change: Callable[..., Any], options: dict[str, Any]) -> None:
    trainer = StepDPOTrainer(golden_model(), config_of(tmp_path, **options), change(golden_pairs()))
    losses, stored = trajectory(trainer)["losses"], json.loads(STORED.read_text())["losses"]
    assert max(abs(a - b) / b for a, b in zip(losses, stored, strict=True)) > 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = trajectory(StepDPOTrainer(golden_model(), config_of(Path(folder)), golden_pairs()))
    STORED.write_text(json.dumps(found, indent=1) + "\n")
