"""Pairs -> prefix forest -> flat tensors under a token budget."""

from stepdpo_kernels.packing.batch import SHARE_MODES, build_batch
from stepdpo_kernels.packing.bins import spread
from stepdpo_kernels.packing.order import SAMPLING_MODES, epoch_order
from stepdpo_kernels.packing.pack import (
    pack_pairs,
    padded_tokens,
    plan_bins,
    plan_ranks,
    savings,
    size_of_pair,
    tokens_of_pair,
)
from stepdpo_kernels.packing.padded import PaddedForest, pack_padded

__all__ = [
    "SAMPLING_MODES",
    "SHARE_MODES",
    "PaddedForest",
    "build_batch",
    "epoch_order",
    "pack_padded",
    "pack_pairs",
    "padded_tokens",
    "plan_bins",
    "plan_ranks",
    "savings",
    "size_of_pair",
    "spread",
    "tokens_of_pair",
]
