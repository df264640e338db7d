"""The types that every part of the library shares, and the shape legend.

Shape legend, used in every docstring and in suffixes of names:

    T   packed tokens of a batch: one per node of its prefix forest
    L   leaves of the forest: runs of consecutive packed tokens with one attention path each
    K   keys gathered by all leaves, every leaf's root-to-leaf path laid end to end
    R   loss rows: one per distinct (position, next token) that a branch's log-prob needs
    S   branches: distinct (prefix, step) token sequences
    P   pairs
    D   hidden size
    V   vocabulary size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from stepdpo_kernels._errors import StepDPOError as StepDPOError

TokenIds = NDArray[np.int32]
_T = TypeVar("_T")


def _token_ids(value: ArrayLike, name: str, pair_id: str) -> TokenIds:
    try:
        ids = np.asarray(value)
    except ValueError:  # ragged
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise StepDPOError(f"pair {pair_id!r}: {name} must be a flat sequence of integers, got {value!r}")
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise StepDPOError(f"pair {pair_id!r}: {name} holds a token id outside 0..2^31-1: {ids.min()}..{ids.max()}")
    ids = ids.astype(np.int32)
    ids.flags.writeable = False
    return ids


@dataclass(frozen=True, eq=False)
class StepPair:
    """One Step-DPO preference: a right step and a wrong step after the same tokens.

    prefix_ids:    token ids of prompt and earlier steps, at least one token (it predicts the first token of a step)
    chosen_ids:    token ids of the preferred step, may be empty
    rejected_ids:  token ids of the other step, may be empty
    id:            names the record in messages
    group:         pairs with equal groups are candidates for one trie (pairs of one problem); "" groups with nothing
    weight:        the pair's weight in the loss, finite and not negative

    Token ids are stored as read-only int32 arrays; any flat sequence of integers is accepted.
    Raises StepDPOError, naming the pair, for an empty prefix, a negative id or a bad weight.
    """

    prefix_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    id: str = ""
    group: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prefix_ids", "chosen_ids", "rejected_ids"):
            object.__setattr__(self, name, _token_ids(getattr(self, name), name, self.id))
        if not self.prefix_ids.size:
            raise StepDPOError(
                f"pair {self.id!r}: prefix_ids is empty, so nothing predicts the first token of a step; "
                "begin the prefix with the prompt or a BOS token"
            )
        if not isinstance(self.weight, Real) or not 0 <= self.weight < np.inf:
            raise StepDPOError(f"pair {self.id!r}: weight must be finite and >= 0, got {self.weight!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepPair):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        ids = (self.prefix_ids.tobytes(), self.chosen_ids.tobytes(), self.rejected_ids.tobytes())
        return (*ids, self.id, self.group, self.weight)


def _each_tensor(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """`value` with every tensor in it changed, one dataclass level at a time."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _each_tensor(getattr(value, f.name), change) for f in fields(value)})
    return value


def _to(value: _T, device: torch.device | str | int, non_blocking: bool) -> _T:
    """`value` with every tensor in it on a device."""
    return _each_tensor(value, lambda tensor: tensor.to(device=device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class Ragged:
    """A 0/1 matrix in compressed rows together with its transpose, for sums that are deterministic both ways.

    index:      (N,) int64: the columns of row 0, then of row 1, ...
    lengths:    (rows,) int64: how many columns each row has
    t_index:    (N,) int64: the rows of column 0, then of column 1, ...
    t_lengths:  (columns,) int64
    """

    index: Tensor
    lengths: Tensor
    t_index: Tensor
    t_lengths: Tensor

    @classmethod
    def from_rows(cls, index: NDArray[np.int64], lengths: NDArray[np.int64], columns: int) -> Ragged:
        """From the columns of each row, laid end to end, and how many each row has."""
        rows = np.repeat(np.arange(lengths.size), lengths)  # (N,)
        order = np.argsort(index, kind="stable")
        return cls(
            index=torch.from_numpy(index.astype(np.int64)),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            t_index=torch.from_numpy(rows[order].astype(np.int64)),
            t_lengths=torch.from_numpy(np.bincount(index, minlength=columns).astype(np.int64)),
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Ragged:
        return _to(self, device, non_blocking)


@dataclass(frozen=True, eq=False)
class TreePlan:
    """Which keys each packed token attends to: leaf-path attention over a prefix forest.

    Leaf l owns the queries `cu_q[l]:cu_q[l+1]` of the packed tokens; its keys are the packed tokens
    `keys.index[cu_k[l]:cu_k[l+1]]`, its whole root-to-leaf path in order of position. The last query is
    aligned with the last key (bottom-right causal): query i of a leaf with q queries and k keys sees the
    keys 0..k-q+i of its path.

    keys:          Ragged with K rows of one packed position each, T columns
    cu_q, cu_k:    (L+1,) int32 cumulative counts
    max_q, max_k:  the largest number of queries and of keys of a leaf
    """

    keys: Ragged
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.keys.t_lengths.numel()

    @property
    def num_leaves(self) -> int:
        """L"""
        return self.cu_q.numel() - 1

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TreePlan:
        return _to(self, device, non_blocking)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The prefix forest of some pairs as flat tensors: what one forward pass works on.

    input_ids:      (T,) int64: one token per forest node, depth-first
    position_ids:   (T,) int64: depth of the node in its tree, the position that rotary embeddings see
    plan:           TreePlan: who attends to whom
    rows:           Ragged with R rows of one packed position each (whose hidden state predicts the row's target)
                    and T columns; sorted by position
    targets:        (R,) int64: the token that each row predicts
    branches:       Ragged with S rows (the loss rows on each branch) and R columns
    chosen:         (P,) int64: each pair's branch, an index into S
    rejected:       (P,) int64
    weights:        (P,) float32
    pair_index:     (P,) int64: where each pair stood in the list that was packed
    pair_ids:       the pairs' ids, for messages
    group_ends:     after how many rows a group of them ends that shares no pair with others, the last one R; empty
                    where that is not known
    tokens_unshared:  tokens that the same pairs take when every branch is encoded on its own

    The last token of a branch predicts nothing, so it is a target and not a node.
    """

    input_ids: Tensor
    position_ids: Tensor
    plan: TreePlan
    rows: Ragged
    targets: Tensor
    branches: Ragged
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    pair_index: Tensor
    pair_ids: Sequence[str] = field(default_factory=tuple)
    group_ends: Sequence[int] = field(default_factory=tuple)
    tokens_unshared: int = 0

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.input_ids.numel()

    @property
    def num_pairs(self) -> int:
        """P"""
        return self.chosen.numel()

    @property
    def num_rows(self) -> int:
        """R"""
        return self.targets.numel()

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """A copy on another device; dtypes stay as they are."""
        return _to(self, device, non_blocking)

    def pin_memory(self) -> PackedBatch:
        """A copy in page-locked memory, from which `to` with non_blocking does not wait for the device.

        torch's DataLoader calls this where it is told to pin memory.
        """
        return _each_tensor(self, Tensor.pin_memory)
