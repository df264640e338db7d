"""A causal "model" that can be written down for both layouts without an attention layer.

The hidden state of a token is tanh of the summed embeddings of all tokens up to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.types import PackedBatch, StepPair
from tests.forests import make_pair

V, D = 60, 6


def parameters(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """embedding and head weight"""
    return tuple(torch.randn(V, D, dtype=dtype).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def padded_hidden(embedding: Tensor, pairs: list[StepPair]) -> tuple[Tensor, Tensor]:
    """(2P, L, D) hidden, (2P, L) labels"""
    batch = padded_batch(pairs)
    return torch.tanh(embedding[batch["input_ids"]].cumsum(dim=1)), batch["labels"]


def packed_hidden(embedding: Tensor, batch: PackedBatch) -> Tensor:  # (T, D)
    return torch.tanh(dense_mask(batch.plan).to(embedding.dtype) @ embedding[batch.input_ids])


def small(pairs: list[StepPair]) -> list[StepPair]:
    """The same trie with token ids below V."""
    return [
        make_pair(p.prefix_ids % V, p.chosen_ids % V, p.rejected_ids % V, id=p.id, group=p.group, weight=p.weight)
        for p in pairs
    ]
