"""Records to token ids, and token ids to batches: what happens on the host before a model sees anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.registry import Case, Provider, Workload

BUDGET = 8192  # tokens of a batch
PADDED_PAIRS = 8  # pairs of a padded batch

LOAD_PROVIDERS = (
    Provider(
        "tokenizer",
        "floor",
        "the fast tokenizer on the text of every branch in one call, and nothing else",
        bound="tokens",
    ),
    Provider("ours", "ours", "load_step_pairs: JSON lines to checked pairs, cut at the step's first token"),
    Provider(
        *("trl", "peer", "JSON lines to a datasets.Dataset, then DPOTrainer's preparation; its EOS is not compared"),
        "trl",
    ),
    Provider("transformers", "peer", "JSON lines, then one call of the tokenizer for prefixes and one for branches"),
)
PACK_PROVIDERS = (
    Provider("concatenate", "floor", "all tokens of all branches into one array, and into a tensor"),
    Provider("ours", "ours", f"pack_pairs, {BUDGET:,} tokens a batch, every common prefix once"),
    Provider("ours-pair", "ours", "the same, prefixes shared within pairs alone"),
    Provider("ours-none", "ours", "the same, nothing shared"),
    Provider(
        *("trl-padded", "peer", f"DataCollatorForPreference, {PADDED_PAIRS} pairs a batch, sorted by length"), "trl"
    ),
    Provider(
        *("transformers-padded", "peer", f"DataCollatorForSeq2Seq, {PADDED_PAIRS} pairs a batch, sorted by length"),
        "transformers",
    ),
)  # fmt: skip


def cases(of: str) -> Callable[[str, str], list[Case]]:
    """The same on every device: nothing of it runs on a GPU."""

    def found(device: str, size: str) -> list[Case]:
        pairs = {"tiny": (16,), "quick": (256,), "full": (64, 256, 1024)}[size]
        return [{"mode": "host", "device": "cpu", "of": of, "lengths": "real", "pairs": n} for n in pairs]

    return found


def _workload(name: str, kernel: str, title: str, providers: Any, of: str, test: str) -> Workload:
    return Workload(name, "data", kernel, title, "pairs", "pairs", cases(of), providers, ("of",), (test,))


WORKLOADS = (
    _workload(
        *("data-load", "load_step_pairs", "Records to token ids", LOAD_PROVIDERS, "records"),
        "tests/data/test_tokenization.py",
    ),
    _workload("data-pack", "pack_pairs", "Pairs to batches", PACK_PROVIDERS, "pairs", "tests/packing/test_pack.py"),
)
