"""Pairs -> prefix forest -> flat tensors under a token budget."""

from stepdpo_kernels.packing.batch import SHARE_MODES, build_batch
from stepdpo_kernels.packing.pack import pack_pairs, plan_bins, savings, tokens_of_pair

__all__ = ["SHARE_MODES", "build_batch", "pack_pairs", "plan_bins", "savings", "tokens_of_pair"]
