"""DPO in the same trainer: whole solutions (`unit="solution"`) against TRL's DPOTrainer on the same texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdpo_kernels.data import StepPairDataset, load_step_pairs
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.trainer import StepDPOTrainer
from tests.trainer.training import write_jsonl

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "beta": 0.1,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}


@pytest.fixture
def records(step_records: Callable[..., Any]) -> list[dict[str, str]]:
    return step_records(3, 4)


@pytest.fixture
def solutions(
    records: list[dict[str, str]], tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> Callable[..., StepPairDataset]:
    file = write_jsonl(tmp_path / "pairs.jsonl", records)
    return lambda **options: load_step_pairs(file, tiny_tokenizer(), unit="solution", **options)


def test_every_token_of_both_solutions_is_in_the_loss_and_their_beginning_cancels(solutions: Any) -> None:
    pair = solutions()[1]  # from step 2 on
    chosen, rejected = pair.chosen_ids.tolist(), pair.rejected_ids.tolist()
    alike = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    assert alike > 20  # all of step 1
    batch = build_batch([pair], [0], "tree")
    assert batch.branches.lengths[batch.chosen].item() == len(chosen)
    assert batch.branches.lengths[batch.rejected].item() == len(rejected)
    assert batch.num_tokens == len(pair.prefix_ids) + len(chosen) + len(rejected) - alike - 2  # once; last is a target
    hidden, weight = torch.randn(batch.num_tokens, 8, requires_grad=True), torch.randn(400, 8)
    loss_fn = StepDPOLoss()
    refs = loss_fn.packed_logps(hidden, weight, batch).detach() + torch.tensor([0.5, -0.5])
    loss_fn.packed(hidden, weight, batch, refs).loss.backward()
    first = len(pair.prefix_ids) - 1
    assert hidden.grad is not None
    moved = hidden.grad.abs().sum(dim=1) > 0
    assert not moved[: first + alike].any()
    assert moved[first + alike :].all()


def test_dpo_equals_the_dpo_of_trl(
    solutions: Any,
    records: list[dict[str, str]],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    config: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """TRL tokenises the texts itself here, and ends them with the EOS as it always does."""
    pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = solutions(template="none")
    texts = [
        {"prompt": r["prompt"]}
        | {side: r["initial_reason_steps"] + r[f"full_{side}"] for side in ("chosen", "rejected")}
        for r in records
    ]
    theirs = DPOTrainer(
        tiny_model(),
        ref_model=tiny_model(),
        args=DPOConfig(str(tmp_path / "trl"), max_length=None, gradient_checkpointing=False, **SETTINGS),
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny_tokenizer(),
    )
    for pair, row in zip(pairs, theirs.train_dataset, strict=True):
        for name, ids in (("prompt", pair.prefix_ids), ("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            assert row[f"{name}_ids"] == ids.tolist()
    ours = StepDPOTrainer(tiny_model(), config(**{"pairs_per_step": None, **SETTINGS}), pairs)
    logged = []
    for trainer in (ours, theirs):
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "rewards/margins" in entry])
    assert len(logged[0]) == 6
    # Sums of some 350 nats in float32 (3e-5 apart), times beta: measured 4e-6 apart.
    for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert [e[name] for e in logged[0]] == pytest.approx([e[name] for e in logged[1]], abs=1e-5), name
    assert logged[0][-1]["rewards/margins"] > 0.1
    assert ours.state.log_history[0]["tokens/saved"] > 0.3
