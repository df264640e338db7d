"""Which pairs each process takes for each optimiser step, and their packing."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from stepdpo_kernels.packing import SAMPLING_MODES, epoch_order, pack_pairs
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.collate import IndexedPairs, StepCollator, StepSampler, step_loader, step_sampler
from tests.forests import make_pair
from tests.trainer.training import losses, watch


def steps(num_pairs: int, pairs_per_step: int, epoch: int = 0, groups: int | None = None, **order) -> list[list[int]]:
    """Numbers of the pairs of each step of an epoch; pair i belongs to group i % groups."""
    pairs = [make_pair([1], [2], [3], group="" if groups is None else str(i % groups)) for i in range(num_pairs)]
    sampler = StepSampler(pairs, pairs_per_step, **order)
    sampler.epoch = epoch
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


@given(
    num_pairs=st.integers(1, 40),
    per_step=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.none() | st.integers(0, 5),
    sampling=st.sampled_from(SAMPLING_MODES),
)
def test_every_pair_comes_once(num_pairs, per_step, epoch, seed, sampling):
    all_steps = steps(num_pairs, per_step, epoch, 7, seed=seed, sampling=sampling)
    assert sorted(chain(*all_steps)) == list(range(num_pairs))
    assert all(len(step) == per_step for step in all_steps[:-1])
    whole = steps(num_pairs, per_step, epoch, 7, seed=seed, sampling=sampling, drop_last=True)
    assert whole == [step for step in all_steps if len(step) == per_step]


@pytest.mark.parametrize("share", ["tree", "pair", "none"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_processes_share_a_step(pairs, share, world_size):
    """Each pair on one of them, problems together where that is fair, about as many tokens each."""
    dataset = IndexedPairs(pairs)
    numbers = [7, 3, 20, 11, 0, 1, 2, 4, 5, 6, 21, 22]
    plans = [
        StepCollator(250, share, rank=rank, world_size=world_size)([dataset[i] for i in numbers])
        for rank in range(world_size)
    ]
    found = [batch.pair_index.tolist() for own in plans for batch in own]
    assert sorted(chain(*found)) == sorted(numbers)
    counts = [len(own) for own in plans]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(batch.num_tokens for batch in own) for own in plans]
    assert max(tokens) - min(tokens) <= max(batch.num_tokens for own in plans for batch in own)


def test_a_budget_of_keys(pairs):
    step = [IndexedPairs(pairs)[i] for i in range(len(pairs))]
    free, bounded = StepCollator(10_000, "tree")(step), StepCollator(10_000, "tree", 400)(step)
    assert max(batch.plan.keys.index.numel() for batch in bounded) <= 400 < free[0].plan.keys.index.numel()
    assert sorted(i for batch in bounded for i in batch.pair_index.tolist()) == list(range(len(pairs)))


def test_how_workers_start(pairs, config):
    args = config(dataloader_num_workers=1, dataloader_multiprocessing_context="spawn")
    loader = step_loader(
        IndexedPairs(pairs), step_sampler(IndexedPairs(pairs), 4, args), StepCollator(250, "tree"), args
    )
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_workers_pack(pairs):
    """The loader's workers give the same steps, and the process that trains packs none of them."""
    dataset, packed_by = IndexedPairs(pairs), []

    class Collator(StepCollator):
        def __call__(self, items):
            batches = super().__call__(items)
            return [replace(batch, pair_ids=(os.getpid(), *batch.pair_ids)) for batch in batches]

        def of_process(self, args):
            return self

    def all_steps(workers):
        args = TrainingArguments(output_dir="unused", dataloader_num_workers=workers, use_cpu=True)
        loader = step_loader(dataset, step_sampler(dataset, 5, args, seed=3), Collator(250, "tree"), args)
        found = [batch for step in loader for batch in step]
        packed_by.append({batch.pair_ids[0] for batch in found})
        return found

    here, there = all_steps(0), all_steps(2)
    assert packed_by[0] == {os.getpid()}
    assert len(packed_by[1]) == 2
    assert os.getpid() not in packed_by[1]
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.plan.keys.index, b.plan.keys.index)
        assert torch.equal(a.pair_index, b.pair_index)
        assert a.pair_ids[1:] == b.pair_ids[1:]


def test_order_depends_on_seed_and_epoch():
    for sampling in SAMPLING_MODES:
        first = steps(50, 10, groups=20, seed=1, sampling=sampling)
        assert first == steps(50, 10, groups=20, seed=1, sampling=sampling)
        assert first != steps(50, 10, groups=20, seed=2, sampling=sampling)
        assert first != steps(50, 10, groups=20, seed=1, sampling=sampling, epoch=1)
    assert list(chain(*steps(50, 10))) == list(range(50))


def test_order_does_not_depend_on_random_numbers_drawn_elsewhere(tiny_model, pairs, config, tmp_path):
    runs = []
    for number in range(2):
        trainer = StepDPOTrainer(tiny_model(), config(output_dir=str(tmp_path / f"run{number}")), pairs)
        seen = watch(trainer)
        torch.manual_seed(number)
        trainer.train()
        runs.append((losses(trainer), [batch.pair_index.tolist() for batch, _, _ in seen]))
    assert runs[0] == runs[1]


def test_sequential_order(tiny_model, pairs, config):
    trainer = StepDPOTrainer(tiny_model(), config(train_sampling_strategy="sequential", learning_rate=0.0), pairs)
    seen = watch(trainer)
    trainer.train()
    numbers = list(chain.from_iterable(batch.pair_index.tolist() for batch, _, _ in seen))
    steps = [numbers[i : i + 4] for i in range(0, 24, 4)]
    assert [sorted(step) for step in steps] == [list(range(i, i + 4)) for i in range(0, 24, 4)]
    assert not any(output.margins.any() for _, output, _ in seen)


def test_grouped_order(tiny_model, pairs, config):
    args = config(train_sampling_strategy="grouped", learning_rate=0.0)
    trainer = StepDPOTrainer(tiny_model(), args, pairs)
    seen = watch(trainer)
    trainer.train()
    numbers = list(chain.from_iterable(batch.pair_index.tolist() for batch, _, _ in seen))
    assert sorted(numbers) == list(range(24))
    drawn = epoch_order(pairs, args.seed, "grouped", pairs_per_step=4)
    for start in range(0, 24, 4):
        assert sorted(numbers[start : start + 4]) == sorted(drawn[start : start + 4])
    # four of a problem in each step, as far as problems go round
    together = [len({pairs[i].group for i in numbers[start : start + 4]}) for start in range(0, 24, 4)]
    assert sum(together) < 12
    assert not any(output.margins.any() for _, output, _ in seen)


def test_epochs_differ(tiny_model, pairs, config):
    trainer = StepDPOTrainer(tiny_model(), config(num_train_epochs=3), pairs)
    seen = watch(trainer)
    trainer.train()
    numbers = list(chain.from_iterable(batch.pair_index.tolist() for batch, _, _ in seen))
    epochs = [numbers[i : i + 24] for i in (0, 24, 48)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("share", ["tree", "none"])
def test_a_step_is_packed_and_numbered_by_the_dataset(pairs, share):
    dataset = IndexedPairs(pairs)
    numbers = [7, 3, 20, 11]
    ours = StepCollator(250, share)([dataset[i] for i in numbers])
    plain = pack_pairs([pairs[i] for i in numbers], 250, share=share)
    assert len(ours) == len(plain) > 1
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert a.pair_index.tolist() == [numbers[i] for i in b.pair_index.tolist()]
        assert a.pair_ids == tuple(pairs[i].id for i in a.pair_index.tolist())
    assert StepCollator(250, share)([]) == []
