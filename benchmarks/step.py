"""The `step` suite: whole training on real pairs, ours beside TRL's DPOTrainer.

Each run is a fresh process, so that peak memory is its own: load the model, compute reference log-probs, take optimiser
steps. Rounds go over all providers in turn. The pairs are those that the first steps of a shuffled epoch of the whole
data set draw, and every provider but `ours-grouped` gets them, in the same order, as the same token ids; `ours-grouped`
gets what problem-grouped sampling draws, which TRL does not have, and is held against TRL on shuffled pairs. Weights in
float32 with bfloat16 compute (or bfloat16 weights, --dtype), AdamW, no dropout; with --lora an adapter instead.

pairs/s is pairs over the seconds of everything that a pair costs in an epoch: reference log-probs, packing or padding,
forward, backward, optimiser. Training alone is reported beside it, for runs of several epochs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import quantile, run_worker, write_rows

PROVIDERS: dict[str, dict[str, Any]] = {
    "ours-grouped": {"trainer": "ours", "share": "tree", "sampling": "grouped"},
    "ours-tree": {"trainer": "ours", "share": "tree"},
    "ours-pair": {"trainer": "ours", "share": "pair"},
    "ours-none": {"trainer": "ours", "share": "none"},
    # pairs padded together; gradients are accumulated to the pairs of a step
    **{f"trl-{pairs}": {"trainer": "trl", "together": pairs} for pairs in (1, 2, 4, 8, 16, 32)},
    **{f"trl-{pairs}-checkpointing": {"trainer": "trl", "together": pairs, "checkpointing": True} for pairs in (1, 8)},
}
DEFAULT_PROVIDERS = ("trl-1", "trl-8", "ours-tree", "ours-grouped")
DEFAULTS = {"share": "tree", "sampling": "shuffle", "together": 1, "checkpointing": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("step").add_argument
    add("--model", help="folder, GGUF file or hub id of a causal language model; without it, random weights")
    add("--data", help="step pairs in the released schema (JSONL); goes with --model")
    add("--providers", nargs="+", choices=sorted(PROVIDERS), default=list(DEFAULT_PROVIDERS))
    add("--pairs-per-step", type=int, default=32, help="pairs of an optimiser step")
    add("--steps", type=int, default=2, help="optimiser steps of each run")
    add("--repeats", type=int, default=3, help="rounds over all providers, interleaved")
    add("--max-tokens", type=int, default=2048, help="our token budget of a forward pass")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights in memory")
    add("--lora", action="store_true", help="train an adapter of rank 16 on all linear layers but the head")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table of medians and writes every run as a row."""
    if (arguments.model is None) != (arguments.data is None):
        raise SystemExit("--model and --data go together")
    if arguments.model is not None:
        measure(arguments)
        return
    from benchmarks.workload import synthetic  # transformers takes seconds to import, and --help should not

    with tempfile.TemporaryDirectory() as folder:
        arguments.model, arguments.data = synthetic(Path(folder))
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    shared = {
        name: getattr(arguments, name)
        for name in ("model", "data", "pairs_per_step", "steps", "max_tokens", "dtype", "threads", "lora")
    }
    rows: list[dict[str, Any]] = []
    for repeat in range(arguments.repeats):
        for provider in arguments.providers:
            result = run_worker("benchmarks.step_worker", {**shared, **DEFAULTS, **PROVIDERS[provider]})
            pairs = result["pairs"]
            row = {
                "provider": provider,
                "lora": arguments.lora,
                "repeat": repeat,
                "pairs_per_step": arguments.pairs_per_step,
                "pairs": pairs,
                "tokens_unshared": result["tokens_unshared"],
                "reference_seconds": result["reference_seconds"],
                "training_seconds": result["training_seconds"],
                "pairs_per_second": pairs / (result["reference_seconds"] + result["training_seconds"]),
                "training_pairs_per_second": pairs / result["training_seconds"],
                "peak_memory_gib": result["peak_memory_gib"],
                "loaded_memory_gib": result["loaded_memory_gib"],
                "first_loss": result["losses"][0],
                "last_loss": result["losses"][-1],
            }
            rows.append(row)
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            write_rows(arguments.output, rows)
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Medians over rounds, with the 20th and 80th percentile, and ratios to TRL's fastest and leanest where it ran."""
    names = dict.fromkeys(row["provider"] for row in rows)
    by_provider = {name: [row for row in rows if row["provider"] == name] for name in names}
    peers = [name for name in names if name.startswith("trl")]

    def middle(name: str, column: str) -> float:
        return median(row[column] for row in by_provider[name])

    fastest = max(peers, key=lambda name: middle(name, "pairs_per_second"), default=None)
    leanest = min(peers, key=lambda name: middle(name, "peak_memory_gib"), default=None)
    columns = (
        "pairs/s",
        "p20",
        "p80",
        "training",
        "peak GiB",
        "loaded GiB",
        "x speed",
        "x training",
        "of memory",
        "of least",
    )
    print(f"\n{'provider':<18}" + "".join(f"{column:>12}" for column in columns))
    for name, own in by_provider.items():
        speeds = [row["pairs_per_second"] for row in own]
        memory = middle(name, "peak_memory_gib")
        figures = [median(speeds), quantile(speeds, 0.2), quantile(speeds, 0.8)]
        figures += [middle(name, "training_pairs_per_second"), memory, middle(name, "loaded_memory_gib")]
        if fastest is not None and leanest is not None:
            # Round by round, so that a drift of the machine's speed cancels.
            for column in ("pairs_per_second", "training_pairs_per_second"):
                pairs = zip(own, by_provider[fastest], strict=True)
                figures.append(median(ours[column] / theirs[column] for ours, theirs in pairs))
            figures += [memory / middle(peer, "peak_memory_gib") for peer in (fastest, leanest)]
        print(f"{name:<18}" + "".join(f"{figure:>12.3f}" for figure in figures))
    if fastest is not None:
        print(f"\nspeed and memory over those of {fastest}, TRL's fastest; of least: of {leanest}, its leanest")
