"""Small runs of TRL's DPOTrainer, as they come and accelerated."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from packaging.version import Version
from trl import DPOConfig, DPOTrainer

from stepdpo_kernels.integrations import trl as integration
from tests.families import FAMILIES, tiny_model

VERSION = integration.VERSION
SETTINGS: dict[str, Any] = {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "beta": 0.4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "seed": 0,
}


def plain_rows(records: list[dict[str, str]]) -> Dataset:
    """Preferences as TRL takes them: prompts that several pairs share, whole completions."""
    return Dataset.from_list(
        [
            {
                "prompt": f"{r['prompt']}\n{r['initial_reason_steps']}",
                "chosen": r["full_chosen"],
                "rejected": r["full_rejected"],
            }
            for r in records
        ]
    )


def make_trainer(
    folder: Path,
    dataset: Any,
    tokenizer: Any,
    *,
    model: Any = None,
    trainer_class: Callable[..., DPOTrainer] = DPOTrainer,
    arguments: dict[str, Any] | None = None,
    family: str = "llama",
    dtype: Any = None,
    **settings: Any,
) -> DPOTrainer:
    """A trainer of a tiny model in `folder`; further settings are of DPOConfig.

    Where nothing else gives it a reference, it gets a model of its own as one.
    """
    arguments = {**arguments} if arguments else {}
    if model is None:
        model = tiny_model(family, dtype=dtype or torch.float32, **FAMILIES[family].config)
        if not settings.get("precompute_ref_log_probs") and "peft_config" not in arguments:
            arguments.setdefault("ref_model", deepcopy(model))
    config = DPOConfig(output_dir=str(folder / "run"), **SETTINGS | settings)
    return trainer_class(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, **arguments)


def history(trainer: DPOTrainer) -> list[dict[str, float]]:
    """What was logged at each step, without how long it took."""
    return [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def since(version: str) -> bool:
    return Version(version) <= VERSION
