"""A process of the `step` suite: one trainer. Reads a JSON object a line, answers each with one.

First the settings, answered when model and data are loaded. Every further line lets the trainer go on to the end of its
next turn: first the reference log-probs of the pairs of each optimiser step, then the steps themselves.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from benchmarks.measure import PeakMemory
from benchmarks.suites.step.floor import LinearProducts
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.packing import epoch_order, pack_pairs
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer, load_model, load_tokenizer
from stepdpo_kernels.types import StepPair


def process_peak() -> int:
    """Bytes: PyTorch's allocator on CUDA, else the resident set of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Turns(TrainerCallback):
    """Stops a trainer at the end of each turn, answers, and waits until it is told to go on."""

    def __init__(self, answers: TextIO, pairs_per_step: int) -> None:
        self.answers, self.pairs_per_step = answers, pairs_per_step
        self.memory: PeakMemory | None = None
        self.load_peak = 0
        self.pairs = 0  # of this turn, in the reference pass

    def loaded(self) -> None:
        self.load_peak = process_peak()
        self.memory = PeakMemory("cuda" if torch.cuda.is_available() else "cpu")
        self._answer({})

    def end(self, **facts: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        assert self.memory
        self._answer(
            {
                "seconds": seconds,
                "processor_seconds": time.process_time() - self._began_processor,
                "peak_bytes": max(self.load_peak, process_peak()),
                "extra_bytes": self.memory.extra_bytes(),
                **facts,
            }
        )

    def count(self, logps: torch.Tensor) -> None:
        """Reference log-probs of (chosen, rejected), each of so many pairs, are there."""
        self.pairs += logps.shape[-1]
        if self.pairs >= self.pairs_per_step:
            self.pairs = 0
            self.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:  # the last thing of a step
            names = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
            self.end(**{name.replace("/", "_"): logs[name] for name in names})

    def _answer(self, facts: dict[str, Any]) -> None:
        print(json.dumps({"status": "ok", **facts}), file=self.answers, flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self._began, self._began_processor = time.perf_counter(), time.process_time()


def drawn(settings: dict[str, Any], tokenizer: Any) -> list[StepPair]:
    """The pairs of the first optimiser steps of an epoch over all pairs, in its order."""
    per_step, count = settings["pairs_per_step"], settings["pairs_per_step"] * settings["steps"]
    everything = load_step_pairs(settings["data"], tokenizer)
    if len(everything) < count:
        raise SystemExit(f"{settings['data']} has {len(everything)} pairs, not {count}")
    order = epoch_order(everything, settings["seed"], settings["sampling"], pairs_per_step=per_step)[:count]
    return [everything[i] for i in order]


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": f"{settings['folder']}/run",
        "learning_rate": 5e-7,
        "lr_scheduler_type": "constant",
        "beta": 0.4,
        "bf16": settings["bf16"],
        "use_cpu": not torch.accelerator.is_available(),
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": settings["checkpointing"],
        "max_steps": settings["steps"],
        "train_sampling_strategy": "sequential",  # the pairs lie in the order of the epoch
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def adapter(settings: dict[str, Any]) -> Any:
    """LoRA on every linear layer but the head, or nothing."""
    if not settings["lora_rank"]:
        return None
    from peft import LoraConfig

    rank = settings["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(settings: dict[str, Any], model: Any, tokenizer: Any, turns: Turns) -> StepDPOTrainer:
    class Ours(StepDPOTrainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            loader = super().get_train_dataloader()
            return loader if self.references.ready else self.in_turns(loader)  # type: ignore[return-value]

        def in_turns(self, loader: DataLoader[Any]) -> Iterator[Any]:
            turns.loaded()
            for step in loader:
                yield step
                turns.end()

    trainer = Ours(
        model,
        StepDPOConfig(
            pairs_per_step=settings["pairs_per_step"],
            max_tokens_per_batch=settings["at_once"],
            share=settings["share"],
            reference_cache_dir=f"{settings['folder']}/cache",
            **common(settings),
        ),
        train_dataset=drawn(settings, tokenizer),
        processing_class=tokenizer,
        peft_config=adapter(settings),
        callbacks=[turns],
    )
    trainer.prepare_references()
    return trainer


def trl(settings: dict[str, Any], model: Any, tokenizer: Any, turns: Turns) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer_class: Any = DPOTrainer
    if settings["packed"]:
        from stepdpo_kernels.integrations.trl import StepDPOTRLTrainer

        trainer_class = StepDPOTRLTrainer

    class Trl(trainer_class):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokens are there, and no EOS is to be added

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            if turns.memory is None:
                turns.loaded()
            logps = super().compute_ref_log_probs(model, inputs)
            turns.count(logps[0])
            return logps

    pairs, per_step = drawn(settings, tokenizer), settings["pairs_per_step"]
    if settings["sorted"]:  # within each step, so that micro-batches pad little; the sum over the step is the same
        steps = [pairs[i : i + per_step] for i in range(0, len(pairs), per_step)]
        pairs = [pair for step in steps for pair in sorted(step, key=length)]
    trainer = Trl(
        model,
        args=DPOConfig(
            per_device_train_batch_size=settings["at_once"],
            gradient_accumulation_steps=per_step // settings["at_once"],
            precompute_ref_log_probs=True,
            max_length=None,
            **common(settings),
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt_ids": pair.prefix_ids.tolist(),
                    "chosen_ids": pair.chosen_ids.tolist(),
                    "rejected_ids": pair.rejected_ids.tolist(),
                }
                for pair in pairs
            ]
        ),
        processing_class=tokenizer,
        peft_config=adapter(settings),
        callbacks=[turns],
    )
    return trainer


class Products:
    """The floor: matrix products over the tokens of each step held once, and over its loss rows."""

    def __init__(self, settings: dict[str, Any], model: Any, tokenizer: Any, turns: Turns) -> None:
        self.turns, self.most = turns, 2 if settings["lora_rank"] else 3
        pairs, per_step = drawn(settings, tokenizer), settings["pairs_per_step"]
        self.steps = [
            [(b.num_tokens, b.num_rows) for b in pack_pairs(pairs[i : i + per_step], settings["max_tokens"])]
            for i in range(0, len(pairs), per_step)
        ]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device, torch.bfloat16 if settings["bf16"] else None)
        self.floor = LinearProducts(model, [size for step in self.steps for size in step])

    def train(self) -> None:
        self.turns.loaded()
        for products in (1, self.most):  # the reference pass, then the step
            for sizes in self.steps:
                for tokens, rows in sizes:
                    self.floor.run(tokens, rows, products)
                self.turns.end(tokens=sum(tokens for tokens, _ in sizes))


class Oracle:
    """What the first step's log must say: each branch alone, full logits, in float64."""

    def __init__(self, settings: dict[str, Any], model: Any, tokenizer: Any, turns: Turns) -> None:
        self.model, self.turns, self.beta = model.double().train(), turns, common(settings)["beta"]
        self.pairs = drawn(settings, tokenizer)

    def train(self) -> None:
        self.turns.loaded()
        self.turns.end()
        sums: dict[str, float] = {"chosen": 0.0, "rejected": 0.0}
        for pair in self.pairs:
            for name, step, sign in (("chosen", pair.chosen_ids, 1), ("rejected", pair.rejected_ids, -1)):
                ids = torch.tensor([*pair.prefix_ids.tolist(), *step.tolist()])
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                logp = logits.log_softmax(dim=1).gather(1, ids[1:, None])[len(pair.prefix_ids) - 1 :].sum()
                # At a margin of zero the loss falls by beta / 2 of it.
                (-sign * self.beta / 2 * logp / len(self.pairs)).backward()
                sums[name] += logp.item() / len(self.pairs)
        gradients = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.stack(gradients).sum().sqrt())
        self.turns.end(loss=math.log(2), grad_norm=norm, logps_chosen=sums["chosen"], logps_rejected=sums["rejected"])


def length(pair: StepPair) -> int:
    return len(pair.prefix_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # progress and logs must not mix with the answers
    settings = json.loads(sys.stdin.readline())
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    model = load_model(settings["model"], settings["dtype"])
    turns = Turns(answers, settings["pairs_per_step"])
    trainers: dict[str, Any] = {"ours": ours, "trl": trl, "products": Products, "oracle": Oracle}
    trainers[settings["trainer"]](settings, model, load_tokenizer(settings["model"]), turns).train()


if __name__ == "__main__":
    main()
