"""Step pairs as a read-only sequence, with what was left out of it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np

from stepdpo_kernels.types import StepDPOError, StepPair

REPORTED = 20


@dataclass(frozen=True)
class LoadReport:
    """What became of the records of a source.

    source:   the path or hub id that was asked for
    files:    the files that were read, by name
    records:  how many records were read
    kept:     how many became pairs
    dropped:  how many were left out, by reason: "too_long", "identical_branches", "empty_branch"
    first:    for each reason the places and ids of the first 20 records left out
    """

    source: str
    files: tuple[str, ...]
    records: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.source}: {self.records} records, {self.kept} kept"
        for reason, count in self.dropped.items():
            names = self.first[reason][:3]
            text += f"; {count} left out as {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}"
        return text


class StepPairDataset(Sequence[StepPair]):
    """A read-only sequence of pairs, usable as a torch map-style dataset. A slice of it is one too.

    report:       LoadReport of the load that the pairs came from; without files where they came from none
    fingerprint:  hex sha256 over token ids, ids, groups and weights of the pairs, in order
    """

    def __init__(self, pairs: Iterable[StepPair], report: LoadReport | None = None) -> None:
        self._pairs = tuple(pairs)
        self.report = report or LoadReport("", (), len(self._pairs), len(self._pairs))

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> StepPair: ...
    @overload
    def __getitem__(self, index: slice) -> StepPairDataset: ...
    def __getitem__(self, index: int | slice) -> StepPair | StepPairDataset:
        if isinstance(index, slice):
            return StepPairDataset(self._pairs[index], self.report)
        return self._pairs[index]

    def __repr__(self) -> str:
        return f"StepPairDataset({len(self)} pairs, {self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for pair in self._pairs:
            for ids in (pair.prefix_ids, pair.chosen_ids, pair.rejected_ids):
                digest.update(struct.pack("<q", ids.size))
                digest.update(ids.astype("<i4").tobytes())
            for text in (pair.id, pair.group):
                encoded = text.encode(errors="surrogatepass")
                digest.update(struct.pack("<q", len(encoded)))
                digest.update(encoded)
            digest.update(struct.pack("<d", pair.weight))
        return digest.hexdigest()

    def split(self, fraction: float, seed: int = 0) -> tuple[StepPairDataset, StepPairDataset]:
        """(rest, held out): about `fraction` of the pairs held out, never a group in both. Both keep their order.

        Groups are drawn at random until at least `fraction` of the pairs is drawn; pairs of group "" are drawn
        one by one. The same seed and pairs give the same split.
        Raises StepDPOError for a fraction outside (0, 1) and where a part would be empty.
        """
        if not 0 < fraction < 1:
            raise StepDPOError(f"fraction must lie between 0 and 1, got {fraction!r}")
        members: dict[tuple[str, int], list[int]] = {}
        for index, pair in enumerate(self._pairs):
            members.setdefault((pair.group, -1 if pair.group else index), []).append(index)
        held: set[int] = set()
        drawn = np.random.default_rng(seed).permutation(len(members))
        groups = list(members.values())
        for group in drawn:
            if len(held) >= fraction * len(self):
                break
            held.update(groups[group])
        if len(held) in (0, len(self)):
            raise StepDPOError(
                f"{len(self)} pairs in {len(members)} groups cannot be split into two parts without dividing a group "
                f"(fraction {fraction})"
            )
        rest = (pair for index, pair in enumerate(self._pairs) if index not in held)
        return (
            StepPairDataset(rest, self.report),
            StepPairDataset((self._pairs[index] for index in sorted(held)), self.report),
        )


def check_vocabulary(dataset: Iterable[StepPair], vocab_size: int) -> None:
    """Raises StepDPOError naming the first pair with a token id that a model of `vocab_size` tokens does not have."""
    for pair in dataset:
        for name in ("prefix_ids", "chosen_ids", "rejected_ids"):
            ids = getattr(pair, name)
            if ids.size and ids.max() >= vocab_size:
                position = int(np.argmax(ids >= vocab_size))
                raise StepDPOError(
                    f"pair {pair.id!r}: {name}[{position}] is token {ids[position]}, but the model's vocabulary has "
                    f"{vocab_size} tokens; use the tokenizer that belongs to the model, or resize its embeddings"
                )
