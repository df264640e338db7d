"""Causal attention along the root-to-leaf paths of a packed prefix forest; see README.md beside this file."""

from stepdpo_kernels.ops.tree_attention.api import tree_attention

__all__ = ["tree_attention"]
