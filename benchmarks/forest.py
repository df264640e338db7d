"""The `forest` suite: forward and backward of the same pairs with prefixes shared by tree, by pair, and not at all.

Nothing else differs: our packing to one token budget, attention and head. The pairs are the first of an epoch, by
problem or shuffled. A process for each provider, rounds over all of them in turn, ratios round by round. Time is that
of all batches of the pairs; memory that of one batch of pairs which fill the budget where nothing is shared.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Worker, quantile, write_rows

PROVIDERS = ("none", "pair", "tree")  # `share`; the first is what the others are held against
TIMEOUT = 1200.0  # seconds that an answer may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("forest").add_argument
    add("--model", help="folder, GGUF file or hub id of a causal language model; without it, random weights")
    add("--data", help="step pairs in the released schema (JSONL); goes with --model")
    add("--pairs", type=int, default=64, help="pairs of a turn")
    add("--sampling", choices=["grouped", "shuffle"], default="grouped", help="which pairs, see epoch_order")
    add("--seed", type=int, default=0, help="of the order in which an epoch draws its pairs")
    add("--max-tokens", type=int, default=2048, help="token budget of a forward pass")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of weights and compute")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    add("--repeats", type=int, default=5, help="rounds over all providers, interleaved")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and writes a row for each provider."""
    if (arguments.model is None) != (arguments.data is None):
        raise SystemExit("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            from benchmarks.workload import synthetic  # transformers takes seconds to import, and --help should not

            arguments.model, arguments.data = synthetic(Path(folder))
        rows = measure(arguments)
    write_rows(arguments.output, rows)
    print_table(rows)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    names = ("model", "data", "pairs", "sampling", "seed", "max_tokens", "dtype", "gradient_checkpointing", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    with ExitStack() as stack:
        workers = {}
        for name in PROVIDERS:
            workers[name] = Worker("benchmarks.forest_worker", TIMEOUT, {})
            stack.callback(workers[name].close)
            facts[name] = ask(workers[name], name, {"do": "load", "share": name, **settings})
        for _ in range(arguments.repeats):
            for name, worker in workers.items():
                seconds[name].append(ask(worker, name, {"do": "measure"})["seconds"])
    return [as_row(name, settings, facts, seconds) for name in PROVIDERS]


def ask(worker: Worker, provider: str, message: dict[str, Any]) -> dict[str, Any]:
    answer = worker.ask(message)
    if answer.pop("status") != "ok":
        raise SystemExit(f"share={provider}: {answer['note']}")
    return answer


def as_row(
    name: str, settings: dict[str, Any], facts: dict[str, dict[str, Any]], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    base = PROVIDERS[0]
    times, own = seconds[name], facts[name]
    gains = [other / mine for mine, other in zip(times, seconds[base], strict=True)]
    kept = ("pairs", "sampling", "seed", "max_tokens", "dtype", "gradient_checkpointing", "threads")
    saved = facts[base]["tokens"] / own["tokens"]
    return {
        "share": name,
        **{key: settings[key] for key in kept},
        **own,
        "seconds": median(times),
        "seconds_20": quantile(times, 0.2),
        "seconds_80": quantile(times, 0.8),
        "pairs_per_second": settings["pairs"] / median(times),
        "tokens_saved": saved,
        "time_saved": median(gains),
        "time_saved_20": quantile(gains, 0.2),
        "time_saved_80": quantile(gains, 0.8),
        "time_saved_of_tokens_saved": median(gains) / saved,
        "rounds": len(times),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    of = rows[0]
    table = Table(
        title=f"{of['pairs']} pairs, {of['sampling']}, {of['dtype']}, {of['max_tokens']:,} tokens a batch",
        title_justify="left",
    )
    saved = ("x tokens saved", "x time saved", "p20", "p80")
    headings = ("share", "tokens", "batches", "pairs/s", *saved, "memory, MiB", "loss")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "share" else "right")
    for row in rows:
        memory = row["extra_bytes"]
        table.add_row(
            row["share"],
            f"{row['tokens']:,}",
            str(row["batches"]),
            f"{row['pairs_per_second']:.2f}",
            *(f"{row[key]:.2f}" for key in ("tokens_saved", "time_saved", "time_saved_20", "time_saved_80")),
            "-" if memory is None else f"{memory / 2**20:,.0f}",
            f"{row['loss']:.4f}",
        )
    table.caption = (
        f"memory: peak of forward and backward of {of['memory_pairs']} pairs in one batch, above weights and gradients"
    )
    Console(width=120).print(table)
