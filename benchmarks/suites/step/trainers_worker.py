"""A process of the `step` suite: one trainer. Reads a JSON object a line, answers each with one.

First the settings, answered when model and data are loaded. Every further line lets the trainer go on to the end of its
next turn: first the reference log-probs of the pairs of each optimiser step, then the steps themselves.
"""

from __future__ import annotations

import gc
import json
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

from benchmarks.measure import PeakMemory, results_alone, volunteer
from benchmarks.suites.step.floor import LinearProducts
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.packing import epoch_order, pack_pairs
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer, load_model, load_tokenizer
from stepdpo_kernels.types import StepPair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def process_peak() -> int:
    """Bytes: PyTorch's allocator on CUDA, else the resident set of the process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Turns(TrainerCallback):
    """Stops a trainer at the end of each turn, answers, and waits until it is told to go on."""

    def __init__(self, answers: TextIO, pairs_per_step: int) -> None:
        self.answers, self.pairs_per_step = answers, pairs_per_step
        self.memory: PeakMemory | None = None
        self.peak = self.extra = 0  # bytes, over all turns
        self.lent = 0  # bytes that the allocator gave back at the end of a turn
        self.pairs = 0  # of this turn, in the reference pass

    def loaded(self) -> None:
        self.peak = process_peak()
        self.memory = PeakMemory(DEVICE)
        self._answer({})

    def end(self, **facts: float) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        assert self.memory
        extra = self.memory.extra_bytes()
        self.peak, self.extra = max(self.peak, process_peak()), max(self.extra, extra or 0)
        if DEVICE == "cuda":
            self._lend()
        told = {"seconds": seconds, "peak_bytes": self.peak, "extra_bytes": None if extra is None else self.extra}
        self._answer({**told, **facts})

    def _lend(self) -> None:
        """Other trainers take their turns with what the allocator holds and does not use."""
        gc.collect()
        held = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        self.lent = held - torch.cuda.memory_reserved()

    def _take_back(self) -> None:
        """As much in one piece, which the allocator cuts up: steps of a training run do not wait for the driver."""
        torch.empty(self.lent, dtype=torch.uint8, device=DEVICE)
        self.lent = 0
        torch.cuda.reset_peak_memory_stats()

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
        if self.lent:
            self._take_back()
        self._began = time.perf_counter()


def drawn(settings: dict[str, Any], tokenizer: Any) -> list[StepPair]:
    """The pairs of the first optimiser steps of an epoch over all pairs, in its order.

    Where settings say "repeat", those of the first step for every step.
    """
    per_step, times = settings["pairs_per_step"], settings["steps"] if settings["repeat"] else 1
    count = per_step * settings["steps"] // times
    everything = load_step_pairs(settings["data"], tokenizer)
    if len(everything) < count:
        raise SystemExit(f"{settings['data']} has {len(everything)} pairs, not {count}")
    order = epoch_order(everything, settings["seed"], settings["sampling"], pairs_per_step=per_step)[:count]
    return [everything[i] for i in order] * times


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": f"{settings['folder']}/run",
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "beta": 0.4,
        "bf16": settings["bf16"],
        "use_cpu": DEVICE == "cpu",
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


def same_adapter(model: Any) -> None:
    """Libraries draw an adapter's first factors each for itself: the same ones for all; the second factors are zero."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)


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
    same_adapter(trainer.model)
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
    same_adapter(trainer.model)
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
        model = model.to(DEVICE, torch.bfloat16 if settings["bf16"] else None)
        self.floor = LinearProducts(model, [size for step in self.steps for size in step])

    def train(self) -> None:
        self.turns.loaded()
        for products in (1, self.most):  # the reference pass, then the step
            for sizes in self.steps:
                for tokens, rows in sizes:
                    self.floor.run(tokens, rows, products)
                self.turns.end(tokens=sum(tokens for tokens, _ in sizes))


class Oracle:
    """What the steps' logs must say: each branch alone, full logits, clipping and AdamW, in float64."""

    def __init__(self, settings: dict[str, Any], model: Any, tokenizer: Any, turns: Turns) -> None:
        if settings["lora_rank"]:
            from peft import get_peft_model

            model = get_peft_model(model, adapter(settings))
        self.model, self.turns = model.double().train(), turns
        same_adapter(self.model)
        self.beta, self.per_step = common(settings)["beta"], settings["pairs_per_step"]
        self.pairs = drawn(settings, tokenizer)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=settings["learning_rate"], weight_decay=0.0
        )

    def train(self) -> None:
        self.turns.loaded()
        steps = [self.pairs[i : i + self.per_step] for i in range(0, len(self.pairs), self.per_step)]
        references = []
        for pairs in steps:
            with torch.no_grad():
                references.append([self.logps(pair) for pair in pairs])
            self.turns.end()
        for pairs, of in zip(steps, references, strict=True):
            self.turns.end(**self.step(pairs, of))

    def step(self, pairs: list[StepPair], references: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        sums = {"loss": 0.0, "logps_chosen": 0.0, "logps_rejected": 0.0}
        self.optimizer.zero_grad()
        for pair, of in zip(pairs, references, strict=True):
            chosen, rejected = self.logps(pair)
            margin = (chosen - of[0]) - (rejected - of[1])
            loss = torch.nn.functional.softplus(-self.beta * margin) / len(pairs)
            loss.backward()
            sums["loss"] += loss.item()
            sums["logps_chosen"] += chosen.item() / len(pairs)
            sums["logps_rejected"] += rejected.item() / len(pairs)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {**sums, "grad_norm": norm.item()}

    def logps(self, pair: StepPair) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the chosen and the rejected step, summed over tokens."""
        sums = []
        for step in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([*pair.prefix_ids.tolist(), *step.tolist()])
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            logps = logits.log_softmax(dim=1).gather(1, ids[1:, None])
            sums.append(logps[len(pair.prefix_ids) - 1 :].sum())
        return sums[0], sums[1]


def length(pair: StepPair) -> int:
    return len(pair.prefix_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def main() -> None:
    volunteer()
    answers = results_alone()
    settings = json.loads(sys.stdin.readline())
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    model = load_model(settings["model"], settings["dtype"])
    turns = Turns(answers, settings["pairs_per_step"])
    trainers: dict[str, Any] = {"ours": ours, "trl": trl, "products": Products, "oracle": Oracle}
    trainers[settings["trainer"]](settings, model, load_tokenizer(settings["model"]), turns).train()


if __name__ == "__main__":
    main()
