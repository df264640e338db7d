"""One run of the `step` suite in its own process: settings as JSON on stdin, one JSON line of results on stdout."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TrainerCallback

from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.packing import epoch_order
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer, load_model, load_tokenizer
from stepdpo_kernels.types import StepPair

SEED = 0
MAX_LENGTH = 1024  # tokens of prefix and step; longer pairs are left out for all providers


class Timer(TrainerCallback):
    """Seconds of training, from its first batch on."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._began


def drawn(settings: dict[str, Any]) -> list[StepPair]:
    """The pairs of the first steps of an epoch over all data, in the order in which they are drawn."""
    pairs = load_step_pairs(settings["data"], load_tokenizer(settings["model"]), max_length=MAX_LENGTH)
    order = epoch_order(pairs, SEED, settings["sampling"], pairs_per_step=settings["pairs_per_step"])
    wanted = settings["pairs_per_step"] * settings["steps"]
    if len(pairs) < wanted:
        raise SystemExit(f"{settings['data']} has {len(pairs)} pairs, not {wanted}")
    return [pairs[i] for i in order[:wanted]]


def adapter(settings: dict[str, Any]) -> Any:
    if not settings["lora"]:
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(settings: dict[str, Any], pairs: list[StepPair], folder: str, common: dict[str, Any]) -> tuple[Any, float]:
    trainer = StepDPOTrainer(
        load_model(settings["model"], settings["dtype"]),
        StepDPOConfig(
            pairs_per_step=settings["pairs_per_step"],
            max_tokens_per_batch=settings["max_tokens"],
            share=settings["share"],
            gradient_checkpointing=settings["checkpointing"],
            reference_cache_dir=f"{folder}/cache",
            **common,
        ),
        train_dataset=pairs,
        processing_class=load_tokenizer(settings["model"]),
        peft_config=adapter(settings),
    )
    began = time.perf_counter()
    trainer.prepare_references()
    return trainer, time.perf_counter() - began


def trl(settings: dict[str, Any], pairs: list[StepPair], folder: str, common: dict[str, Any]) -> tuple[Any, float]:
    """With its fused head, which it always takes, and on the tokens of the pairs: from texts it would add an EOS."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **options: Any) -> Dataset:
            return dataset

    rows = [
        {
            "prompt_ids": pair.prefix_ids.tolist(),
            "chosen_ids": pair.chosen_ids.tolist(),
            "rejected_ids": pair.rejected_ids.tolist(),
        }
        for pair in pairs
    ]
    model = load_model(settings["model"], settings["dtype"])
    began = time.perf_counter()  # it computes reference log-probs when it is made
    trainer = OnTokens(
        model,
        args=DPOConfig(
            per_device_train_batch_size=settings["together"],
            gradient_accumulation_steps=settings["pairs_per_step"] // settings["together"],
            gradient_checkpointing=settings["checkpointing"],
            precompute_ref_log_probs=True,
            max_length=MAX_LENGTH,
            use_cpu=not torch.accelerator.is_available(),
            **common,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(settings["model"]),
        peft_config=adapter(settings),
    )
    return trainer, time.perf_counter() - began


def main() -> None:
    settings = json.load(sys.stdin)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    results, sys.stdout = sys.stdout, sys.stderr  # progress and logs must not mix with the result
    pairs = drawn(settings)
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": f"{folder}/run",
            "learning_rate": 1e-4 if settings["lora"] else 5e-7,
            "lr_scheduler_type": "constant",
            "beta": 0.4,
            "bf16": True,
            "optim": "adamw_torch_fused",
            "train_sampling_strategy": "sequential",
            "max_steps": settings["steps"],
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": SEED,
        }
        load_model(settings["model"], settings["dtype"])  # what reading the file takes at most is not training's
        loaded = _peak_gib()
        trainer, reference_seconds = {"ours": ours, "trl": trl}[settings["trainer"]](settings, pairs, folder, common)
        trainer.add_callback(timer)
        trainer.train()
    result = {
        "pairs": len(pairs),
        "tokens_unshared": sum(2 * p.prefix_ids.size + p.chosen_ids.size + p.rejected_ids.size for p in pairs),
        "reference_seconds": reference_seconds,
        "training_seconds": timer.seconds,
        "peak_memory_gib": _peak_gib(),
        "loaded_memory_gib": loaded,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    print(json.dumps(result), file=results)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
