"""From pairs to optimiser steps, and from the pairs of a step to its forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainingArguments

from stepdpo_kernels.packing import build_batch, epoch_order, plan_ranks
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
    """The pairs of each optimiser step of an epoch, over all processes.

    Every pair is drawn once an epoch: the last step is short where the number of pairs is no multiple of
    `pairs_per_step`.

    seed:       with `epoch`, decides the order; None keeps the order of the dataset
    sampling:   "shuffle" or "grouped", see `epoch_order`
    drop_last:  leave a short last step out
    """

    def __init__(
        self,
        pairs: Sequence[StepPair],
        pairs_per_step: int,
        *,
        seed: int | None = None,
        sampling: str = "shuffle",
        drop_last: bool = False,
    ) -> None:
        self.pairs, self.pairs_per_step, self.seed, self.sampling = pairs, pairs_per_step, seed, sampling
        self.starts = range(0, len(pairs) - (pairs_per_step - 1 if drop_last else 0), pairs_per_step)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = list(range(len(self.pairs)))
        else:
            order = epoch_order(self.pairs, self.seed + self.epoch, self.sampling, pairs_per_step=self.pairs_per_step)
        for start in self.starts:
            yield order[start : start + self.pairs_per_step]


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins, also where a run is resumed in the middle of one."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].batch_sampler.epoch = int(state.epoch)


class StepCollator:
    """Packs the pairs of an optimiser step into as few forward passes as the token budget allows.

    Each process plans for all, which takes milliseconds, and packs its share: pairs of one problem stay together, and
    the processes encode about as many tokens each. Where there are fewer batches than processes, some get none.

    `PackedBatch.pair_index` of the result counts through the dataset, not through the step.
    """

    def __init__(
        self, max_tokens: int, share: str, max_keys: int | None = None, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.max_tokens, self.share, self.max_keys = max_tokens, share, max_keys
        self.rank, self.world_size = rank, world_size

    def __call__(self, items: Sequence[tuple[int, StepPair]]) -> list[PackedBatch]:
        numbers = torch.tensor([number for number, _ in items], dtype=torch.int64)
        pairs = [pair for _, pair in items]
        plans = plan_ranks(pairs, self.max_tokens, self.world_size, share=self.share, max_keys=self.max_keys)
        batches = [build_batch(pairs, indices, self.share) for indices in plans[self.rank]]
        return [replace(batch, pair_index=numbers[batch.pair_index]) for batch in batches]

    def of_process(self, args: TrainingArguments) -> StepCollator:
        """The same for this process's share of a step."""
        ranks = {"rank": args.process_index, "world_size": args.world_size}
        return StepCollator(self.max_tokens, self.share, self.max_keys, **ranks)


def step_sampler(dataset: IndexedPairs, pairs_per_step: int, args: TrainingArguments, **order: Any) -> StepSampler:
    """Of a configuration; "sequential" is a seed of None in `order`."""
    sampling = "grouped" if args.train_sampling_strategy == "grouped" else "shuffle"
    return StepSampler(dataset.pairs, pairs_per_step, sampling=sampling, **order)


def step_loader(
    dataset: IndexedPairs, sampler: StepSampler, collator: StepCollator, args: TrainingArguments
) -> DataLoader[Any]:
    """One item a step, packed by the loader's workers if it has any (`dataloader_num_workers`).

    Not prepared by accelerate, which repeats pairs where they do not divide among the processes.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator.of_process(args),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        prefetch_factor=args.dataloader_prefetch_factor,
    )
