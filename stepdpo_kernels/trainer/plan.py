"""What a run would do, found without running the model: `StepDPOTrainer.plan()` and `stepdpo train --dry_run`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.trainer.collate import IndexedPairs
from stepdpo_kernels.trainer.memory import MemoryPlan, ModelSizes, plan_memory
from stepdpo_kernels.trainer.reference import cached_table
from stepdpo_kernels.trainer.sharding import zero_stage
from stepdpo_kernels.types import PackedBatch, StepDPOError

if TYPE_CHECKING:
    from stepdpo_kernels.trainer.trainer import StepDPOTrainer


@dataclass(frozen=True)
class EpochPlan:
    """One pass over a dataset, packed, over all processes.

    batches:   forward passes, and `most_batches` of one process
    tokens:    tokens that are encoded, T of all batches
    unshared:  tokens of the same branches each on its own, without padding
    rows:      tokens that are predicted, R of all batches
    largest_tokens, largest_rows, largest_keys:  the largest T, R and K of a batch
    """

    batches: int
    most_batches: int
    tokens: int
    unshared: int
    rows: int
    largest_tokens: int
    largest_rows: int
    largest_keys: int


def plan_epoch(steps: Iterable[list[PackedBatch]], accelerator: Accelerator) -> EpochPlan:
    """Counts the batches of this process's dataloader, one step at a time, and those of all. All must call it."""
    sums, largest = [0, 0, 0, 0], [0, 0, 0]
    for step in steps:
        for batch in step:
            counts = (1, batch.num_tokens, batch.tokens_unshared, batch.num_rows)
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
            sizes = (batch.num_tokens, batch.num_rows, batch.plan.keys.index.numel())
            largest = [max(a, b) for a, b in zip(largest, sizes, strict=True)]
    counted = accelerator.gather(torch.tensor([[*sums, *largest]], device=accelerator.device))  # (processes, 7)
    batches, tokens, unshared, rows = counted[:, :4].sum(dim=0).tolist()
    most_batches, *_ = counted.amax(dim=0).tolist()
    return EpochPlan(batches, most_batches, tokens, unshared, rows, *counted[:, 4:].amax(dim=0).tolist())


_EVERY_STEP = {
    "adapter_off": "the model without its adapter, in every step",
    "model": "a second model, in every step",
}


@dataclass(frozen=True)
class TrainingPlan:
    """What `StepDPOTrainer.train` would do; `print` shows it.

    pairs:            pairs that are trained on
    left_out:         records that were left out when they were loaded, by reason
    processes:        processes that share a step
    pairs_per_step:   pairs of an optimiser step
    epochs:           passes over the pairs
    steps_per_epoch:  optimiser steps, and `steps` in all
    max_tokens:       budget of a forward pass
    epoch:            the first epoch
    evaluation:       a pass over the pairs to evaluate on, where there are some
    reference_mode:   as `StepDPOConfig.reference`
    reference:        forward passes, over all processes, that the reference's log-probs take before training, by
                      dataset ("train", "eval"): 0 where they are cached; empty unless they are precomputed
    learning_rate:    its peak, and the `schedule` after `warmup_steps` optimiser steps
    memory:           estimated bytes for each process; None where `memory.py` cannot tell, for DeepSpeed below ZeRO-3
                      and for models whose configuration is not like Llama's
    """

    pairs: int
    left_out: Mapping[str, int]
    processes: int
    pairs_per_step: int
    epochs: float
    steps_per_epoch: int
    steps: int
    max_tokens: int
    epoch: EpochPlan
    evaluation: EpochPlan | None
    reference_mode: str
    reference: Mapping[str, int]
    learning_rate: float
    schedule: str
    warmup_steps: int
    memory: MemoryPlan | None

    @property
    def fill(self) -> float:
        """Tokens of an epoch over the room in its forward passes."""
        return self.epoch.tokens / (max(self.epoch.batches, 1) * self.max_tokens)

    @property
    def saved(self) -> float:
        """Share of the unshared tokens that is not encoded."""
        return 1 - self.epoch.tokens / max(self.epoch.unshared, 1)

    def __str__(self) -> str:
        epoch = self.epoch
        left_out = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.left_out.items())
        each = f", at most {epoch.most_batches:,} on one of {self.processes} processes" if self.processes > 1 else ""
        lines = {
            "pairs": f"{self.pairs:,}" + (f"; left out: {left_out}" if left_out else "; none left out"),
            "optimiser steps": f"{self.steps_per_epoch:,} an epoch of {self.pairs_per_step:,} pairs each, "
            f"{self.steps:,} in all ({self.epochs:g} epochs)",
            "forward passes": f"{epoch.batches:,} an epoch{each}",
            "tokens": f"{epoch.tokens:,} encoded an epoch, {epoch.unshared - epoch.tokens:,} ({self.saved:.1%}) saved; "
            f"{epoch.rows:,} predicted",
            "fill": f"{self.fill:.1%} of {self.max_tokens:,} tokens a forward pass",
            "learning rate": f"{self.learning_rate:g} at its peak after {self.warmup_steps:,} warm-up steps, "
            f"{self.schedule} schedule",
            "reference": "; ".join(
                f"{name}: {f'{passes:,} forward passes first' if passes else 'cached'}"
                for name, passes in self.reference.items()
            )
            or _EVERY_STEP.get(self.reference_mode, "none"),
            "memory": f"about {self.memory} (estimated, for each process)"
            if self.memory is not None
            else "not estimated for this model or this way of sharding",
        }
        if self.evaluation is not None:
            lines["evaluation"] = f"{self.evaluation.batches:,} forward passes, {self.evaluation.tokens:,} tokens"
        return "\n".join(f"{name:16}{text}" for name, text in lines.items())


def plan_training(trainer: StepDPOTrainer) -> TrainingPlan:
    """The plan of a trainer that has not trained, one epoch packed as it would be; see `StepDPOTrainer.plan`."""
    args, accelerator, dataset = trainer.args, trainer.accelerator, trainer.train_dataset
    with torch.random.fork_rng(devices=[]):  # dataloaders draw from it
        loader = trainer.get_train_dataloader()
        epoch = plan_epoch(loader, accelerator)
        evaluation = None if trainer.eval_dataset is None else plan_epoch(trainer.get_eval_dataloader(), accelerator)
        reference = _reference_passes(trainer, epoch, evaluation)
    steps_per_epoch = max(len(loader), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    report = getattr(dataset.pairs, "report", None)
    return TrainingPlan(
        pairs=len(dataset),
        left_out=dict(report.dropped) if report is not None else {},
        processes=args.world_size,
        pairs_per_step=args.per_device_train_batch_size * args.world_size,
        epochs=steps / steps_per_epoch if args.max_steps > 0 else args.num_train_epochs,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        max_tokens=args.max_tokens_per_batch,
        epoch=epoch,
        evaluation=evaluation,
        reference_mode=args.reference,
        reference=reference,
        learning_rate=args.learning_rate,
        schedule=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        warmup_steps=args.get_warmup_steps(steps),
        memory=_memory(trainer, epoch),
    )


def _reference_passes(trainer: StepDPOTrainer, epoch: EpochPlan, evaluation: EpochPlan | None) -> dict[str, int]:
    if trainer.args.reference != "precomputed":
        return {}
    passes: dict[str, int] = {}
    for name, dataset, packed in (
        ("train", trainer.train_dataset, epoch),
        ("eval", trainer.eval_dataset, evaluation),
    ):
        if packed is not None:
            key = trainer.reference_key(name, dataset)
            cached = cached_table(trainer.args.reference_cache_dir, key) is not None
            passes[name] = 0 if cached else packed.batches + _left_out_of_steps(trainer, name, dataset)
    return passes


def _left_out_of_steps(trainer: StepDPOTrainer, name: str, dataset: IndexedPairs) -> int:
    """Forward passes for pairs that dataloader_drop_last keeps out of the first epoch's steps."""
    if name != "train" or not trainer.args.dataloader_drop_last:
        return 0
    drawn = {i for step in trainer.get_train_dataloader().batch_sampler for i in step}  # type: ignore[union-attr]
    return len(trainer.data_collator([dataset[i] for i in range(len(dataset)) if i not in drawn]))


def sharding_of(accelerator: Accelerator) -> str | None:
    """In the words of `plan_memory`; None where it has none."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "zero3" if zero_stage(accelerator) == 3 else None
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp"
    return "ddp" if accelerator.num_processes > 1 else "none"


def _memory(trainer: StepDPOTrainer, epoch: EpochPlan) -> MemoryPlan | None:
    args: Any = trainer.args
    sharding = sharding_of(trainer.accelerator)
    try:
        sizes = ModelSizes.of(trainer.model)
    except StepDPOError:
        return None
    if sharding is None:
        return None
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else causal_lm(trainer.model).dtype
    plan = plan_memory(
        sizes,
        max_tokens=epoch.largest_tokens,
        max_rows=epoch.largest_rows,
        max_keys=epoch.largest_keys if args.device.type == "cuda" else 0,
        world_size=args.world_size,
        sharding=sharding,
        compute=compute,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing),
    )
    if args.reference != "model":
        return plan
    shards = args.world_size if sharding in ("fsdp", "zero3") else 1
    second: Any = trainer.ref_model
    return replace(plan, reference=ModelSizes.of(second).stored // shards)
