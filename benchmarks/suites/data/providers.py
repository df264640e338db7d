"""How each provider of the `data` suite computes: what it prepares, and the function of no arguments that is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.suites.data import BUDGET, PADDED_PAIRS
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import PackedBatch, StepPair

IGNORED = -100  # label of a token that is in no step

Texts = tuple[str, str, str]  # of prefix, right step, wrong step
Ids = list[tuple[list[int], list[int], list[int]]]


# ---- records to token ids -------------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "pairs.jsonl").open() as file:
        return [json.loads(line) for line in file]


def texts(folder: Path) -> list[Texts]:
    """With what the tokenizer's chat template puts around a problem, written out."""
    return [
        (f"<|user|>\n{r['prompt']}\n<|assistant|>\n{r['initial_reason_steps']}", r["chosen"], r["rejected"])
        for r in read(folder)
    ]


def tokenizer_of(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def load_floor(folder: Path) -> Callable[[], Any]:
    tokenizer = tokenizer_of(folder).backend_tokenizer
    branches = [prefix + step for prefix, *steps in texts(folder) for step in steps]
    return lambda: tokenizer.encode_batch(branches)


def load_ours(folder: Path) -> Callable[[], Any]:
    from stepdpo_kernels import load_step_pairs

    tokenizer = tokenizer_of(folder)

    def run() -> Any:
        found = load_step_pairs(folder / "pairs.jsonl", tokenizer, max_length=None)
        return [(p.prefix_ids, p.chosen_ids, p.rejected_ids) for p in found]

    return run


def load_trl(folder: Path) -> Callable[[], Any]:
    import datasets
    from trl import DPOTrainer

    tokenizer = tokenizer_of(folder)
    # All that the method asks of its trainer and of its arguments.
    trainer, arguments = SimpleNamespace(_tokenizer=tokenizer), SimpleNamespace(dataset_num_proc=None, max_length=None)

    def run() -> Any:
        columns = zip(*texts(folder), strict=True)
        dataset = datasets.Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))
        hidden = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:  # a dataset in memory is not cached
            return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train")
        finally:
            if not hidden:
                datasets.enable_progress_bars()

    return run


def load_transformers(folder: Path) -> Callable[[], Ids]:
    tokenizer = tokenizer_of(folder)

    def run() -> Ids:
        found = texts(folder)
        prefixes = tokenizer([prefix for prefix, *_ in found]).input_ids
        branches = tokenizer([prefix + step for prefix, *steps in found for step in steps]).input_ids
        return [(ids, branches[2 * i][len(ids) :], branches[2 * i + 1][len(ids) :]) for i, ids in enumerate(prefixes)]

    return run


LOAD: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "tokenizer": load_floor,
    "ours": load_ours,
    "trl": load_trl,
    "transformers": load_transformers,
}


# ---- token ids to batches -------------------------------------------------------------------------------------------


def pack_floor(pairs: list[StepPair]) -> Callable[[], Any]:
    def run() -> Any:
        parts = [ids for p in pairs for ids in (p.prefix_ids, p.chosen_ids, p.prefix_ids, p.rejected_ids)]
        return torch.from_numpy(np.concatenate(parts))

    return run


def pack_ours(share: str) -> Callable[[list[StepPair]], Callable[[], list[PackedBatch]]]:
    return lambda pairs: lambda: pack_pairs(pairs, BUDGET, share=share)


def padded(pairs: list[StepPair], collate: Callable[[list[dict[str, list[int]]]], Any]) -> Callable[[], list[Any]]:
    """Batches of pairs of like lengths; `collate` takes the lists of a tokenised dataset's rows."""
    rows = [
        {
            "prompt_ids": p.prefix_ids.tolist(),
            "chosen_ids": p.chosen_ids.tolist(),
            "rejected_ids": p.rejected_ids.tolist(),
        }
        for p in pairs
    ]

    def length(row: dict[str, list[int]]) -> int:
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def run() -> list[Any]:
        ordered = sorted(rows, key=length)
        return [collate(ordered[i : i + PADDED_PAIRS]) for i in range(0, len(ordered), PADDED_PAIRS)]

    return run


def pack_trl(pairs: list[StepPair]) -> Callable[[], list[Any]]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return padded(pairs, DataCollatorForPreference(pad_token_id=0))


def pack_transformers(pairs: list[StepPair]) -> Callable[[], list[Any]]:
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    collate = DataCollatorForSeq2Seq(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"))

    def of_both_steps(rows: list[dict[str, list[int]]]) -> Any:
        return collate(
            [
                {"input_ids": row["prompt_ids"] + row[step], "labels": [IGNORED] * len(row["prompt_ids"]) + row[step]}
                for step in ("chosen_ids", "rejected_ids")
                for row in rows
            ]
        )

    return padded(pairs, of_both_steps)


PACK: dict[str, Callable[[list[StepPair]], Callable[[], Any]]] = {
    "concatenate": pack_floor,
    "ours": pack_ours("tree"),
    "ours-pair": pack_ours("pair"),
    "ours-none": pack_ours("none"),
    "trl-padded": pack_trl,
    "transformers-padded": pack_transformers,
}
