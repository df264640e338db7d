"""From pairs to optimiser steps, and from the pairs of a step to its forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainingArguments

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import PackedBatch, StepPair


class IndexedPairs(Dataset[tuple[int, StepPair]]):
    """Pairs with their numbers, and room for the reference's branch log-probs: (N, 2), chosen and rejected."""

    def __init__(self, pairs: Sequence[StepPair]) -> None:
        self.pairs = pairs
        self.ref_logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, StepPair]:
        return index, self.pairs[index]


class StepSampler(Sampler[list[int]]):
    """This process's pairs of each optimiser step of an epoch.

    Every pair is drawn once an epoch, over all processes: the last step is short, and some of its shares may be empty,
    where the number of pairs is no multiple of `pairs_per_step`.

    seed:       with `epoch`, decides the order; None keeps the order of the dataset
    drop_last:  leave a short last step out
    """

    def __init__(
        self,
        num_pairs: int,
        pairs_per_step: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pairs_per_step, self.seed = pairs_per_step, seed
        self.rank, self.world_size = rank, world_size
        self.num_pairs = num_pairs
        self.starts = range(0, num_pairs - (pairs_per_step - 1 if drop_last else 0), pairs_per_step)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = list(range(self.num_pairs))
        else:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
        for start in self.starts:
            yield order[start : start + self.pairs_per_step][self.rank :: self.world_size]


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins, also where a run is resumed in the middle of one."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].batch_sampler.epoch = int(state.epoch)


class StepCollator:
    """Packs the pairs of an optimiser step into as few forward passes as the token budget allows.

    `PackedBatch.pair_index` of the result counts through the dataset, not through the step.
    """

    def __init__(self, max_tokens: int, share: str) -> None:
        self.max_tokens, self.share = max_tokens, share

    def __call__(self, items: Sequence[tuple[int, StepPair]]) -> list[PackedBatch]:
        numbers = torch.tensor([number for number, _ in items], dtype=torch.int64)
        batches = pack_pairs([pair for _, pair in items], self.max_tokens, share=self.share)
        return [replace(batch, pair_index=numbers[batch.pair_index]) for batch in batches]


def step_sampler(dataset: IndexedPairs, pairs_per_step: int, args: TrainingArguments, **order: Any) -> StepSampler:
    return StepSampler(len(dataset), pairs_per_step, rank=args.process_index, world_size=args.world_size, **order)


def step_loader(
    dataset: IndexedPairs, sampler: StepSampler, collator: StepCollator, args: TrainingArguments
) -> DataLoader[Any]:
    """One item a step. Not prepared by accelerate, which repeats pairs where they do not divide among the processes."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
