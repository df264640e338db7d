"""Every number of the demonstration, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Defaults: the demonstration. `QUICK`: every stage end to end in seconds, too small to learn anything."""

    seed: int = 0
    chain: int = 5  # steps of a problem

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4

    sft_steps: int = 500
    sft_batch: int = 64
    sft_learning_rate: float = 3e-3

    collect_problems: int = 1150
    temperature: float = 0.8
    continuations: int = 6  # sampled from the prefix of each located error

    beta: float = 0.5
    learning_rate: float = 1e-5
    epochs: int = 4
    pairs_per_step: int = 64
    max_tokens_per_batch: int = 4096

    evaluation_problems: int = 2000
    curve_problems: int = 400  # for accuracy during training, other problems than the evaluation's
    curve_every: int = 4  # optimiser steps
    timing_steps: int = 12  # optimiser steps of each way of packing that are timed

    generation_batch: int = 500


QUICK = Settings(
    chain=2,
    hidden_size=64,
    layers=2,
    sft_steps=200,
    sft_batch=32,
    sft_learning_rate=1e-2,
    collect_problems=128,
    continuations=8,
    epochs=2,
    pairs_per_step=16,
    evaluation_problems=64,
    curve_problems=16,
    curve_every=2,
    timing_steps=2,
)
