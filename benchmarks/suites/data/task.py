"""What a process does for a provider of the `data` suite."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks.lengths import draw_lengths, pairs_of
from benchmarks.registry import Case, Task
from benchmarks.suites.data import BUDGET, PADDED_PAIRS
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import PackedBatch, StepPair

VOCABULARY = 49_152
TOKENIZER_VOCABULARY = 4000
SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ke", "lo", "mi", "nu", "pa", "qui", "ro", "se", "tu", "ve")
TEMPLATE = "{% for m in messages %}<|user|>\n{{ m['content'] }}\n{% endfor %}{{ '<|assistant|>\n' }}"
UNLIMITED = 10**9

Texts = tuple[str, str, str]  # of prefix, right step, wrong step
Ids = list[tuple[list[int], list[int], list[int]]]


def tolerance(case: Case) -> float:
    """Of the share of pairs that are not what they should be."""
    return 0.0


def needs(provider: str, case: Case) -> int:
    return 0


def prepare(case: Case, folder: Path) -> None:
    """A tokenizer of byte pairs, trained on the made-up words of the records beside it: pairs.jsonl."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    records = made_records(case["pairs"])
    with (folder / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|eos|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((record["prompt"] + record["chosen"] for record in made_records(200)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>", pad_token="<|eos|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")


def made_records(pairs: int) -> list[dict[str, str]]:
    """Of the released schema; as many words as real pairs have tokens."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(count))

    solutions: dict[int, tuple[str, str]] = {}
    records = []
    for of in draw_lengths(pairs):
        problem, steps = solutions.setdefault(of.problem, (words(of.shortest // 2), words(of.shortest // 4)))
        beyond = f" {words(of.beyond // 2)}" if of.beyond else ""
        records.append(
            {
                "prompt": problem,
                "initial_reason_steps": f"Let's think step by step.\n{steps}{beyond}\nStep 2:",
                "chosen": f" {words(of.chosen // 2 + 1)}",
                "rejected": f" {words(of.rejected // 2 + 1)}",
                "answer": str(of.problem),
            }
        )
    return records


def read(folder: Path) -> list[dict[str, Any]]:
    with (folder / "pairs.jsonl").open() as file:
        return [json.loads(line) for line in file]


def texts(folder: Path) -> list[Texts]:
    return [
        (f"<|user|>\n{r['prompt']}\n<|assistant|>\n{r['initial_reason_steps']}", r["chosen"], r["rejected"])
        for r in read(folder)
    ]


class Call:
    """A function of no arguments, and what its result says."""

    keeps_state = False
    note = ""

    def __init__(self, run: Callable[[], Any], facts: Callable[[Any], dict[str, float]]) -> None:
        self.run = run
        self.facts = facts(run())

    def value(self, outputs: Any) -> None:
        return None


# ---- records to token ids -------------------------------------------------------------------------------------------


def tokenizer_of(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def load_floor(folder: Path) -> Callable[[], Any]:
    tokenizer = tokenizer_of(folder).backend_tokenizer
    branches = [prefix + step for prefix, *steps in texts(folder) for step in steps]
    return lambda: tokenizer.encode_batch(branches)


def load_ours(folder: Path) -> Callable[[], Ids]:
    from stepdpo_kernels import load_step_pairs

    tokenizer = tokenizer_of(folder)

    def run() -> Ids:
        found = load_step_pairs(folder / "pairs.jsonl", tokenizer, max_length=None)
        return [(p.prefix_ids, p.chosen_ids, p.rejected_ids) for p in found]  # type: ignore[misc]

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


def ids_of(result: Any, eos: int) -> Ids:
    """Of each pair, without an end-of-text token after a step."""
    if isinstance(result, list):
        rows = [tuple(list(map(int, part)) for part in row) for row in result]
    else:
        columns = (result[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        rows = list(zip(*columns, strict=True))
    return [(p, *(step[:-1] if step[-1:] == [eos] else step for step in steps)) for p, *steps in rows]  # type: ignore[misc]


def wrong_ids(provider: str, folder: Path) -> float:
    """Share of pairs that are not prefix and step tokenised together and cut where the step begins."""
    tokenizer = tokenizer_of(folder)
    found = ids_of(LOAD[provider](folder)(), tokenizer.eos_token_id)
    wrong = 0
    for (prefix, *steps), ids in zip(texts(folder), found, strict=True):
        cut = len(tokenizer(prefix).input_ids)
        branches = [tokenizer(prefix + step).input_ids for step in steps]
        wrong += ids != (branches[0][:cut], branches[0][cut:], branches[1][cut:])
    return wrong / len(found)


LOAD: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "tokenizer": load_floor,
    "ours": load_ours,
    "trl": load_trl,
    "transformers": load_transformers,
}


# ---- token ids to batches -------------------------------------------------------------------------------------------


def made_pairs(count: int) -> list[StepPair]:
    return pairs_of(draw_lengths(count), VOCABULARY)


def pack_floor(pairs: list[StepPair]) -> Callable[[], Any]:
    def run() -> Any:
        parts = [ids for p in pairs for ids in (p.prefix_ids, p.chosen_ids, p.prefix_ids, p.rejected_ids)]
        return torch.from_numpy(np.concatenate(parts))

    return run


def pack_ours(share: str) -> Callable[[list[StepPair]], Callable[[], list[PackedBatch]]]:
    return lambda pairs: lambda: pack_pairs(pairs, BUDGET, share=share)


def pack_trl(pairs: list[StepPair]) -> Callable[[], list[Any]]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(pad_token_id=0)
    names = ("prefix", "chosen", "rejected")
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{key: getattr(p, f"{n}_ids").tolist() for key, n in zip(keys, names, strict=True)} for p in pairs]

    def length(row: dict[str, list[int]]) -> int:
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def run() -> list[Any]:
        ordered = sorted(rows, key=length)
        return [collate(ordered[i : i + PADDED_PAIRS]) for i in range(0, len(ordered), PADDED_PAIRS)]

    return run


def branches_of(result: Any) -> list[tuple[list[int], list[int]]]:
    """(prefix and step, the step) of every branch that can be read from the batches."""
    found = []
    for batch in result:
        if isinstance(batch, PackedBatch):
            found += packed_branches(batch)
        else:
            for ids, real, step in zip(*(batch[k] for k in PADDED_KEYS), strict=True):
                found.append((ids[real.bool()].tolist(), ids[step.bool()].tolist()))
    return found


PADDED_KEYS = ("input_ids", "attention_mask", "completion_mask")


def packed_branches(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    found = []
    rows = batch.branches.index.split(batch.branches.lengths.tolist())
    places = batch.rows.index
    plan = batch.plan
    for chosen_or_rejected in torch.stack([batch.chosen, batch.rejected], dim=1).flatten().tolist():
        own = rows[chosen_or_rejected]
        last = int(places[own[-1]])
        leaf = int(torch.searchsorted(plan.cu_q, last, right=True)) - 1
        path = plan.keys.index[int(plan.cu_k[leaf]) : int(plan.cu_k[leaf + 1])]
        way = batch.input_ids[path[: int(batch.position_ids[last]) + 1]].tolist()
        step = batch.targets[own].tolist()
        found.append((way + step[-1:], step))
    return found


def wrong_branches(provider: str, pairs: list[StepPair]) -> float:
    """Share of branches that cannot be read back from the batches."""
    expected = sorted(
        (p.prefix_ids.tolist() + step.tolist(), step.tolist()) for p in pairs for step in (p.chosen_ids, p.rejected_ids)
    )
    found = sorted(branches_of(PACK[provider](pairs)()))
    wrong = sum(a != b for a, b in zip(found, expected, strict=False))
    return (wrong + abs(len(found) - len(expected))) / len(expected)


def pack_facts(result: Any, pairs: list[StepPair]) -> dict[str, float]:
    """Tokens, padding among them, beside those of the forest of all pairs."""
    unique = pack_pairs(pairs, UNLIMITED)[0].num_tokens
    if isinstance(result, torch.Tensor):
        return {"unique_tokens": unique}
    tokens = sum(b.num_tokens if isinstance(b, PackedBatch) else b["input_ids"].numel() for b in result)
    return {"tokens": tokens, "unique_tokens": unique, "of_unique": tokens / unique, "batches": len(result)}


PACK: dict[str, Callable[[list[StepPair]], Callable[[], Any]]] = {
    "concatenate": pack_floor,
    "ours": pack_ours("tree"),
    "ours-pair": pack_ours("pair"),
    "ours-none": pack_ours("none"),
    "trl-padded": pack_trl,
}


def load(provider: str, case: Case, folder: Path) -> Task:
    if case["of"] == "records":
        return Call(LOAD[provider](folder), lambda _: {})
    pairs = made_pairs(case["pairs"])
    return Call(PACK[provider](pairs), lambda result: pack_facts(result, pairs))


def errors(provider: str, case: Case) -> dict[str, float]:
    from tempfile import TemporaryDirectory

    if provider in ("tokenizer", "concatenate"):
        return {}
    if case["of"] == "pairs":
        return {"error": wrong_branches(provider, made_pairs(60))}
    with TemporaryDirectory(prefix="stepdpo-") as folder:
        prepare({**case, "pairs": 60}, Path(folder))
        return {"error": wrong_ids(provider, Path(folder))}
