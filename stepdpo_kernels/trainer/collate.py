"""From pairs of one optimiser step to its forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import PackedBatch, StepPair

# A forward pass: its forest, and the reference's branch log-probs (2P,) for it, chosen first.
MicroBatch = tuple[PackedBatch, Tensor | None]


class ReferencedPairs(Dataset[tuple[StepPair, Tensor | None]]):
    """Pairs side by side with their reference log-probs (N, 2), chosen and rejected; None without a reference."""

    def __init__(self, pairs: Sequence[StepPair], ref_logps: Tensor | None) -> None:
        self.pairs, self.ref_logps = pairs, ref_logps

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[StepPair, Tensor | None]:
        return self.pairs[index], None if self.ref_logps is None else self.ref_logps[index]


class StepCollator:
    """Packs the pairs of an optimiser step into as few forward passes as the token budget allows."""

    def __init__(self, max_tokens: int, share: str) -> None:
        self.max_tokens, self.share = max_tokens, share

    def __call__(self, items: Sequence[tuple[StepPair, Tensor | None]]) -> list[MicroBatch]:
        batches = pack_pairs([pair for pair, _ in items], self.max_tokens, share=self.share)
        if items[0][1] is None:
            return [(batch, None) for batch in batches]
        table = torch.stack([ref for _, ref in items if ref is not None])  # (P, 2)
        return [(batch, table[batch.pair_index].T.reshape(-1)) for batch in batches]
