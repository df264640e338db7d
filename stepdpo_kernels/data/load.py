"""`load_step_pairs`: read, check, tokenise, and count what does not fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stepdpo_kernels.data.dataset import REPORTED, LoadReport, StepPairDataset
from stepdpo_kernels.data.records import BRANCH_FIELDS, RawRecord, StepRecord, check_record, shorten
from stepdpo_kernels.data.sources import open_source
from stepdpo_kernels.data.tokenization import StepTokenizer, TokenizedStep
from stepdpo_kernels.types import StepDPOError, StepPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("stepdpo_kernels")

BATCH = 512  # records tokenised at a time: enough to keep a fast tokenizer's threads busy


class Unfit(NamedTuple):
    """Why a record is left out: reason in one word, what is wrong, and what to do."""

    reason: str
    problem: str
    advice: str


def load_step_pairs(
    path_or_hub_id: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    template: str = "chat",
    boundary: str = "joint",
    unit: str = "step",
    max_length: int | None = 1024,
    max_tokens: int | None = None,
    share: str = "tree",
    strict: bool = False,
    limit: int | None = None,
) -> StepPairDataset:
    """Step pairs of a .jsonl, .jsonl.gz, .json or .parquet file, of a folder of such files, or of a hub dataset.

    A record has the fields of Math-Step-DPO-10K: strings `prompt`, `initial_reason_steps`, `chosen`, `rejected`;
    optionally `id` (default: "<file>:<line or row>"), `group` (default: a hash of the prompt, so that the pairs of
    one problem share a group) and `weight` (default 1). Other fields are ignored. With unit "solution", `full_chosen`
    and `full_rejected` take the place of `chosen` and `rejected`.

    split:       of a hub dataset; in a folder with files named after it (train-00000.parquet), only those are read
    template:    how the prompt is written: "chat" (the tokenizer's), "alpaca", "deepseek-math", "qwen2-boxed", "none"
    boundary:    "joint" tokenises prompt, steps and step as one text and cuts at the step; "separate" each on its own
    unit:        "step": one step after prompt and earlier steps. "solution", for DPO: the whole solution after the
                 prompt, which is `initial_reason_steps` + `full_chosen` (as released; a `full_chosen` that begins with
                 these steps is whole already), ended by the chat template's end of turn or the tokenizer's EOS
    max_length:  tokens of prefix and longer branch, None for no limit
    max_tokens:  tokens of prefix and both branches together, None for no limit
    share:       as in pack_pairs: with "none" the prefix counts twice towards max_tokens
    strict:      raise at the first record that would be left out
    limit:       read only the first so many records

    No text is truncated, no EOS is added after a step, and there is never more than one BOS. Records are left out,
    and counted in `.report`, as "too_long", "identical_branches" (equal token ids) or "empty_branch" (a step or
    solution that is empty or white space; a solution may also be missing or null).

    Raises StepDPOError, naming file, line, id, field and value, for anything malformed: a path without data, a file
    that is empty or not what its name says, a missing field or one of the wrong type, an id that comes twice, a
    prompt without tokens; for a record left out under `strict`; and where no record is kept.
    """
    for name, value, least in (("max_length", max_length, 2), ("max_tokens", max_tokens, 2), ("limit", limit, 1)):
        if value is not None and value < least:
            raise StepDPOError(f"{name} must be at least {least}, got {value!r}")
    tokenize = StepTokenizer(tokenizer, template=template, boundary=boundary, unit=unit)
    source = open_source(path_or_hub_id, split)
    name = os.fspath(path_or_hub_id)

    pairs: list[StepPair] = []
    dropped: dict[str, int] = {}
    first: dict[str, list[str]] = {}
    total = 0
    for records in _batches(_unique(islice(source.records, limit), unit)):
        total += len(records)
        for record, tokens in zip(records, tokenize(records), strict=True):
            unfit = why_unfit(record, tokens, unit, max_length, max_tokens, prefixes=2 if share == "none" else 1)
            if unfit is None:
                pairs.append(_pair(record, tokens))
                continue
            if strict:
                raise StepDPOError(f"{record.name}: {unfit.problem}; {unfit.advice}, or load without strict")
            dropped[unfit.reason] = dropped.get(unfit.reason, 0) + 1
            names = first.setdefault(unfit.reason, [])
            if len(names) < REPORTED:
                names.append(record.name)
    report = LoadReport(
        source=name,
        files=source.files,
        records=total,
        kept=len(pairs),
        dropped=dropped,
        first={reason: tuple(names) for reason, names in first.items()},
    )
    if not pairs:
        raise StepDPOError(f"no record can be used: {report}; mend the records, or raise max_length or max_tokens")
    logger.log(logging.WARNING if dropped else logging.INFO, "%s", report)
    return StepPairDataset(pairs, report)


def _unique(raw: Iterable[RawRecord], unit: str) -> Iterator[StepRecord]:
    seen: dict[str, str] = {}
    for value in raw:
        record = check_record(value, unit)
        if record.id in seen:
            raise StepDPOError(
                f"{record.where}: field 'id': {shorten(record.id)} is the id of {seen[record.id]} already; "
                "give every record its own id, or none"
            )
        seen[record.id] = record.where
        yield record


def _batches(records: Iterator[StepRecord]) -> Iterator[list[StepRecord]]:
    while batch := list(islice(records, BATCH)):
        yield batch


def why_unfit(
    record: StepRecord,
    tokens: TokenizedStep,
    unit: str,
    max_length: int | None,
    max_tokens: int | None = None,
    *,
    prefixes: int = 1,
) -> Unfit | None:
    """Why `load_step_pairs` leaves a record out; None for one that it keeps. prefixes: how often they are encoded."""
    prefix, chosen, rejected = map(len, tokens)
    right, wrong = BRANCH_FIELDS[unit]
    for field, text, length in ((right, record.chosen, chosen), (wrong, record.rejected, rejected)):
        if not text.strip() or not length:
            problem = f"field {field!r} holds no {unit}: {shorten(text)}"
            return Unfit("empty_branch", problem, f"write the {unit} or remove the record")
    if tokens.chosen_ids == tokens.rejected_ids:
        problem = f"fields {right!r} and {wrong!r} have the same tokens: {shorten(record.chosen)}"
        return Unfit("identical_branches", problem, "remove the record")
    longer, text = (right, record.chosen) if chosen >= rejected else (wrong, record.rejected)
    step = f"{longer!r} {shorten(text)}"
    length = prefix + max(chosen, rejected)
    if max_length is not None and length > max_length:
        problem = (
            f"too long: {prefix} tokens before the {unit} and {length - prefix} of {step} "
            f"exceed max_length {max_length}"
        )
        return Unfit("too_long", problem, f"raise max_length to {length} or remove the record")
    length = prefixes * prefix + chosen + rejected
    if max_tokens is not None and length > max_tokens:
        problem = (
            f"too long: {prefixes * prefix} tokens before the {unit}, {chosen} of {right!r} and {rejected} of "
            f"{wrong!r} exceed max_tokens {max_tokens}, the longer {unit} is {step}"
        )
        return Unfit("too_long", problem, f"raise max_tokens to {length} or remove the record")
    return None


def _pair(record: StepRecord, tokens: TokenizedStep) -> StepPair:
    if not tokens.prefix_ids:
        raise StepDPOError(
            f"{record.name}: no token lies before the step, so nothing predicts its first token: field 'prompt' is "
            f"{shorten(record.prompt)}, field 'initial_reason_steps' {shorten(record.initial_reason_steps)}; "
            "give the record a prompt, or use a template or a tokenizer with a BOS token"
        )
    prefix, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in tokens)
    return StepPair(prefix, chosen, rejected, id=record.id, group=record.group, weight=record.weight)
