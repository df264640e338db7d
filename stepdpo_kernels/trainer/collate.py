"""From the pairs of one optimiser step to its forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

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


class StepCollator:
    """Packs the pairs of an optimiser step into as few forward passes as the token budget allows.

    `PackedBatch.pair_index` of the result counts through the dataset, not through the step.
    """

    def __init__(self, max_tokens: int, share: str) -> None:
        self.max_tokens, self.share = max_tokens, share

    def __call__(self, items: Sequence[tuple[int, StepPair]]) -> list[PackedBatch]:
        numbers = torch.tensor([number for number, _ in items])
        batches = pack_pairs([pair for _, pair in items], self.max_tokens, share=self.share)
        return [replace(batch, pair_index=numbers[batch.pair_index]) for batch in batches]
