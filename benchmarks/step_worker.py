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
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer, load_model, load_tokenizer


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, forward to optimiser."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def ours(settings: dict[str, Any], folder: str, common: dict[str, Any]) -> tuple[Any, StepTimer, float]:
    tokenizer = load_tokenizer(settings["model"])
    timer = StepTimer()
    trainer = StepDPOTrainer(
        load_model(settings["model"], settings["dtype"]),
        StepDPOConfig(
            pairs_per_step=settings["pairs_per_step"],
            max_tokens_per_batch=settings["max_tokens"],
            share=settings["share"],
            reference_cache_dir=f"{folder}/cache",
            **common,
        ),
        train_dataset=load_step_pairs(
            settings["data"], tokenizer, limit=settings["pairs_per_step"] * settings["steps"]
        ),
        processing_class=tokenizer,
        callbacks=[timer],
    )
    began = time.perf_counter()
    trainer.prepare_references()
    return trainer, timer, time.perf_counter() - began


def trl(settings: dict[str, Any], folder: str, common: dict[str, Any]) -> tuple[Any, StepTimer, float]:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(settings["model"])

    def render(record: dict[str, Any]) -> dict[str, str]:
        chat = [{"role": "user", "content": record["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return {
            "prompt": prompt + record["initial_reason_steps"],
            "chosen": record["chosen"],
            "rejected": record["rejected"],
        }

    count = settings["pairs_per_step"] * settings["steps"]
    data = load_dataset("json", data_files=settings["data"], split="train", cache_dir=f"{folder}/cache")
    data = data.select(range(count)).map(render, remove_columns=data.column_names)
    timer = StepTimer()
    began = time.perf_counter()
    trainer = DPOTrainer(
        load_model(settings["model"], settings["dtype"]),
        args=DPOConfig(
            per_device_train_batch_size=settings["pairs_per_step"],
            gradient_accumulation_steps=1,
            gradient_checkpointing=settings["gradient_checkpointing"],
            precompute_ref_log_probs=True,
            max_length=1024,
            use_cpu=not torch.accelerator.is_available(),
            **common,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[timer],
    )
    # Reference log-probs are computed when the dataloader or the trainer is made, depending on the version.
    trainer.get_train_dataloader()
    return trainer, timer, time.perf_counter() - began


def main() -> None:
    settings = json.load(sys.stdin)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    results, sys.stdout = sys.stdout, sys.stderr  # progress and logs must not mix with the result
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": f"{folder}/run",
            "learning_rate": 5e-7,
            "lr_scheduler_type": "constant",
            "beta": 0.4,
            "bf16": True,
            "max_steps": settings["steps"],
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        provider = {"ours": ours, "trl": trl}[settings["trainer"]]
        trainer, timer, reference_seconds = provider(settings, folder, common)
        trainer.train()
    result = {
        "step_seconds": timer.seconds,
        "reference_seconds": reference_seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "first_loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
    }
    print(json.dumps(result), file=results)


if __name__ == "__main__":
    main()
