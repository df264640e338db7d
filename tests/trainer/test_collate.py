"""Which pairs each process takes for each optimiser step, and their packing."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.collate import IndexedPairs, StepCollator, StepSampler
from tests.trainer.training import losses, watch


def shares(num_pairs: int, pairs_per_step: int, world_size: int = 1, epoch: int = 0, **order) -> list[list[list[int]]]:
    """[step][process]: numbers of pairs"""
    samplers = [
        StepSampler(num_pairs, pairs_per_step, rank=rank, world_size=world_size, **order) for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
    return [list(step) for step in zip(*samplers, strict=True)]


@given(
    num_pairs=st.integers(1, 40),
    per_process=st.integers(1, 5),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    seed=st.none() | st.integers(0, 5),
)
def test_every_pair_comes_once_in_the_same_steps_whatever_the_processes(
    num_pairs, per_process, world_size, epoch, seed
):
    per_step = per_process * world_size
    alone = [step[0] for step in shares(num_pairs, per_step, epoch=epoch, seed=seed)]
    together = shares(num_pairs, per_step, world_size, epoch, seed=seed)
    assert sorted(chain(*alone)) == list(range(num_pairs))
    assert [sorted(chain(*step)) for step in together] == [sorted(step) for step in alone]
    assert all(len(step) == per_step for step in alone[:-1])
    sizes = [[len(share) for share in step] for step in together]
    assert all(max(step) - min(step) <= 1 for step in sizes)
    whole = shares(num_pairs, per_step, world_size, epoch, seed=seed, drop_last=True)
    assert whole == [step for step in together if sum(map(len, step)) == per_step]


def test_order_depends_on_seed_and_epoch():
    first = shares(50, 10, seed=1)
    assert first == shares(50, 10, seed=1)
    assert first != shares(50, 10, seed=2)
    assert first != shares(50, 10, seed=1, epoch=1)
    assert list(chain(*chain(*shares(50, 10)))) == list(range(50))


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
