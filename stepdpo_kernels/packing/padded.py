"""The prefix forest of a padded batch, and the way back to its places: for trainers that pad."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepdpo_kernels.packing.batch import SHARE_MODES, int64, loss_rows, one_column, tree_plan, trie_units
from stepdpo_kernels.packing.trie import Ints, Sequences, build_forest, spans
from stepdpo_kernels.types import PackedBatch, Ragged, StepDPOError, _to


@dataclass(frozen=True, eq=False)
class PaddedForest:
    """A padded batch of 2P sequences of at most W tokens, the chosen first, as a forest.

    batch:   PackedBatch; pair p is the sequences p and P + p, and branch i is sequence i
    mask:    (2P, W-1) bool: column t tells whether token t+1 has a log-prob
    tokens:  Ragged with a row for each of these tokens, row by row of the mask, of one of the R loss rows each
    nodes:   Ragged with 2P * W rows of one packed token each, for what else a model computes of each token; padding
             has the first. None unless asked for
    """

    batch: PackedBatch
    mask: Tensor
    tokens: Ragged
    nodes: Ragged | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PaddedForest:
        return _to(self, device, non_blocking)


def pack_padded(
    input_ids: Tensor,  # (2P, W)
    attention_mask: Tensor,  # (2P, W)
    loss_mask: Tensor,  # (2P, W)
    *,
    share: str = "tree",
    every_token: bool = False,
) -> PaddedForest:
    """The forest of a padded batch. Loss and gradient are those of the padded one.

    Args:
        input_ids: (2P, W) token ids on the CPU, the chosen sequences first, then the rejected in the same order.
        attention_mask: (2P, W), 0 for padding; the tokens of a sequence stand together, padded on either side.
        loss_mask: (2P, W), not 0 where the log-prob of a token is wanted; nothing predicts the first token of a
            sequence, which therefore has none. Any pattern: the tokens need not stand together.
        share: as in `pack_pairs`. With "pair" and "tree" the two sequences of a pair share what they begin with.
        every_token: also encode the last token of each sequence, which predicts nothing, and give `nodes`.

    Raises:
        StepDPOError: shapes that do not fit, an odd number of sequences, a sequence without tokens or one with a gap,
            by number.
        ValueError: an unknown `share`.
    """
    if share not in SHARE_MODES:
        raise ValueError(f"share must be one of {', '.join(SHARE_MODES)}, got {share!r}")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or shape[0] % 2 or any(tuple(mask.shape) != shape for mask in (attention_mask, loss_mask)):
        raise StepDPOError(
            "a padded batch holds pairs, the chosen sequences first: input_ids, attention_mask and loss_mask must be "
            f"(2P, W), got {shape}, {tuple(attention_mask.shape)} and {tuple(loss_mask.shape)}"
        )
    ids = input_ids.numpy().astype(np.int32)
    real = attention_mask.numpy() != 0
    lengths = real.sum(1)  # (2P,)
    begins = real.argmax(1) if shape[1] else lengths
    _check_runs(real, begins, lengths)
    encoded = lengths if every_token else np.maximum(lengths - 1, 1)
    sequences = Sequences.of(
        (row[begin : begin + size],) for row, begin, size in zip(ids, begins.tolist(), encoded.tolist(), strict=True)
    )
    pairs = shape[0] // 2
    # trie_units counts a pair's sequences one after the other, here they stand half the batch apart.
    units = [[b // 2 + b % 2 * pairs for b in unit] for unit in trie_units(pairs, share)]
    forest = build_forest(sequences, units)
    paths = forest.cu_k[forest.homes]  # (2P,) where the path of each sequence begins

    wanted = (loss_mask.numpy() != 0) & real
    wanted[np.arange(shape[0]), begins] = False
    which, columns = wanted.nonzero()  # (N,)
    edges, row_of_token = loss_rows(forest.paths[paths[which] + columns - begins[which] - 1], ids[which, columns])
    counts = wanted.sum(1)
    batch = PackedBatch(
        input_ids=int64(forest.tokens),
        position_ids=int64(forest.depths),
        plan=tree_plan(forest),
        rows=one_column(edges >> 32, forest.tokens.size),
        targets=int64(edges & 0xFFFFFFFF),
        branches=Ragged.from_rows(row_of_token, counts, edges.size),
        chosen=torch.arange(pairs),
        rejected=torch.arange(pairs, 2 * pairs),
        weights=torch.ones(pairs),
        pair_index=torch.arange(pairs),
        pair_ids=tuple(map(str, range(pairs))),
        tokens_unshared=int(lengths.sum()),
    )
    nodes = None
    if every_token:
        index = np.zeros(shape, np.int64)
        index[real] = forest.paths[spans(paths, lengths)]
        nodes = one_column(index.ravel(), forest.tokens.size)
    return PaddedForest(batch, torch.from_numpy(wanted[:, 1:].copy()), one_column(row_of_token, edges.size), nodes)


def _check_runs(real: np.ndarray, begins: Ints, lengths: Ints) -> None:
    """Raises StepDPOError for sequences without tokens or with padding between them."""
    for number, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        if not length:
            raise StepDPOError(f"sequence {number} of the batch has no tokens: its attention_mask is 0 everywhere")
        if not real[number, begin : begin + length].all():
            raise StepDPOError(
                f"sequence {number} of the batch has padding between its tokens (attention_mask): put it at one end"
            )
