"""The `step` suite: training on real pairs, ours beside TRL's DPOTrainer; reference log-probs and optimiser included.

A process for each provider: it loads the model, then takes its turns in rounds that go over all providers, first the
reference log-probs of the pairs of each optimiser step, then the steps. The steps are the first of an epoch over all
pairs. Ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Worker, quantile, write_rows

# A provider's name is its trainer and any of these words, joined by "-". A number is what a forward pass takes at once:
# tokens of ours (--max-tokens), pairs of TRL. "packed" is TRL's trainer with integrations.trl, "live" keeps a reference
# model in memory and asks it in every step, as TRL does unless told otherwise.
WORDS: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {
        "grouped": {"sampling": "grouped"},
        "pair": {"share": "pair"},
        "none": {"share": "none"},
        "checkpointing": {"checkpointing": True},
    },
    "trl": {
        "checkpointing": {"checkpointing": True},
        "unsorted": {"sorted": False},
        "compiled": {"compiled": True},
        "compact": {"compact": True},
        "packed": {"packed": True},
        "live": {"live": True},
    },
}
DEFAULTS: dict[str, Any] = {
    "sampling": "shuffle",
    "share": "tree",
    "checkpointing": False,
    "compiled": False,
    "sorted": True,
    "compact": False,
    "packed": False,
    "live": False,
}
DEFAULT_PROVIDERS = ("ours", "ours-grouped", "trl-2")
TIMEOUT = 1800.0  # seconds that a turn may take
GIB = 2**30


def settings_of(name: str, max_tokens: int) -> dict[str, Any]:
    """Raises argparse.ArgumentTypeError for a name that is none."""
    trainer, *words = name.split("-")
    if trainer not in WORDS:
        raise argparse.ArgumentTypeError(f"{name!r}: a provider begins with {' or '.join(WORDS)}")
    settings = {"trainer": trainer, "at_once": max_tokens if trainer == "ours" else 1, **DEFAULTS}
    for word in words:
        if word.isdecimal() and int(word):
            settings["at_once"] = int(word)
        elif word in WORDS[trainer]:
            settings |= WORDS[trainer][word]
        else:
            raise argparse.ArgumentTypeError(f"{name!r}: after {trainer} come a number, {', '.join(WORDS[trainer])}")
    return settings


def provider(name: str) -> str:
    settings_of(name, 1)
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("step").add_argument
    words = "; ".join(f"{trainer}: {', '.join(words)}" for trainer, words in WORDS.items())
    add("--model", help="folder, GGUF file or hub id of a causal language model; without it, random weights")
    add("--data", help="step pairs in the released schema (JSONL); goes with --model")
    add(
        "--providers",
        nargs="+",
        type=provider,
        default=list(DEFAULT_PROVIDERS),
        help=f"ours or trl, a number (tokens of ours, pairs of TRL in a forward pass) and words ({words}), joined by -",
    )
    add("--pairs-per-step", type=int, default=32, help="pairs of an optimiser step")
    add("--repeats", type=int, default=5, help="rounds over all providers, interleaved, after one of warm-up")
    add("--max-tokens", type=int, default=2048, help="our token budget of a forward pass")
    add("--lora-rank", type=int, default=0, help="train an adapter on all linear layers but the head; 0: all weights")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights in memory; compute is in bfloat16")
    add("--seed", type=int, default=0, help="of the order in which an epoch draws its pairs")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table of medians and writes a row for each provider and round."""
    if (arguments.model is None) != (arguments.data is None):
        raise SystemExit("--model and --data go together")
    for name in arguments.providers:
        at_once = settings_of(name, 1)["at_once"]
        if name.startswith("trl") and arguments.pairs_per_step % at_once:
            raise SystemExit(
                f"{name}: {at_once} pairs at once do not divide --pairs-per-step {arguments.pairs_per_step}"
            )
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            from benchmarks.workload import synthetic  # transformers takes seconds to import, and --help should not

            arguments.model, arguments.data = synthetic(Path(folder))
        arguments.model = plain_folder(arguments.model, arguments.dtype, Path(folder) / "plain")
        rows = measure(arguments, Path(folder))
    write_rows(arguments.output, rows)
    print_tables(rows)


def plain_folder(model: str, dtype: str, folder: Path) -> str:
    """The model, or what a GGUF file holds as a plain folder: dequantising takes more memory than training."""
    if Path(model).suffix != ".gguf" and not (Path(model).is_dir() and not (Path(model) / "config.json").exists()):
        return model
    from stepdpo_kernels.trainer import load_model, load_tokenizer

    load_model(model, dtype).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    names = ("model", "data", "pairs_per_step", "lora_rank", "dtype", "seed", "threads")
    settings = {name: getattr(arguments, name) for name in names} | {"steps": 1 + arguments.repeats}
    own = {name: settings_of(name, arguments.max_tokens) for name in arguments.providers}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in own}
    with ExitStack() as stack:
        workers = {}
        for name in own:
            (folder / name).mkdir()
            # Threads spin as libgomp has them do by itself: turns leave the machine to one process.
            environment = {"TMPDIR": str(folder / name), "GOMP_SPINCOUNT": "300000"}
            workers[name] = Worker("benchmarks.step_worker", TIMEOUT, environment)
            stack.callback(workers[name].close)
            ask(workers[name], name, {**settings, **own[name], "folder": str(folder / name)})
        for _ in range(2 * settings["steps"]):
            for name, worker in workers.items():
                turns[name].append(ask(worker, name, {}))
    return [
        as_row(name, number, settings, own[name], turns[name]) for number in range(settings["steps"]) for name in own
    ]


def ask(worker: Worker, name: str, message: dict[str, Any]) -> dict[str, Any]:
    answer = worker.ask(message)
    if answer.pop("status") != "ok":
        raise SystemExit(f"{name}: {answer['note']}")
    return answer


def as_row(
    name: str, number: int, settings: dict[str, Any], own: dict[str, Any], turns: list[dict[str, Any]]
) -> dict[str, Any]:
    """Of round `number`; 0 is warm-up."""
    reference, step = turns[number], turns[settings["steps"] + number]
    pairs = settings["pairs_per_step"]
    both = reference["seconds"] + step["seconds"]
    return {
        "provider": name,
        "round": number,
        **{key: settings[key] for key in ("pairs_per_step", "lora_rank", "dtype", "seed", "threads")},
        "sampling": own["sampling"],
        "at_once": own["at_once"],
        "reference_seconds": reference["seconds"],
        "step_seconds": step["seconds"],
        "processor_seconds": reference["processor_seconds"] + step["processor_seconds"],
        "pairs_per_second": pairs / both,
        "training_pairs_per_second": pairs / step["seconds"],
        "peak_bytes": turns[-1]["peak_bytes"],
        "extra_bytes": turns[-1]["extra_bytes"],
        "loss": step["loss"],
        "logps_chosen": step["logps_chosen"],
        "logps_rejected": step["logps_rejected"],
    }


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Medians of the rounds after warm-up; then speed and memory of each of ours beside each of TRL's."""
    first = rows[0]
    names = dict.fromkeys(row["provider"] for row in rows)
    by_name = {name: [row for row in rows if row["provider"] == name and row["round"]] for name in names}
    what = f"LoRA of rank {first['lora_rank']}" if first["lora_rank"] else "all weights"
    title = f"steps of {first['pairs_per_step']} pairs, {what}, {first['dtype']}"
    headings = ("pairs/s", "p20", "p80", "training alone", "reference alone", "peak, GiB", "above loaded", "loss")
    table = Table("provider", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, own in by_name.items():
        speeds = [row["pairs_per_second"] for row in own]
        extra = own[0]["extra_bytes"]
        figures = (
            *(median(speeds), quantile(speeds, 0.2), quantile(speeds, 0.8)),
            median(row["training_pairs_per_second"] for row in own),
            median(
                row["pairs_per_step"] / row["reference_seconds"] if row["reference_seconds"] > 0.01 else nan
                for row in own
            ),
            own[0]["peak_bytes"] / GIB,
        )
        loss = sum(row["loss"] for row in own) / len(own)
        table.add_row(
            name,
            *("-" if isnan(figure) else f"{figure:.2f}" for figure in figures),
            "-" if extra is None else f"{extra / GIB:.2f}",
            f"{loss:.4f}",
        )
    console = Console(width=120)
    console.print(table)
    for base in (name for name in names if name.startswith("trl")):
        table = Table("provider", title=f"beside {base}", title_justify="left")
        for heading in ("x pairs/s", "p20", "p80", "x training alone", "of its peak", "of its peak above loaded"):
            table.add_column(heading, justify="right")
        for name in names:
            if name != base:
                table.add_row(name, *(f"{figure:.2f}" for figure in beside(by_name[name], by_name[base]).values()))
        console.print(table)


def beside(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of one provider to another, round by round, so that a drift of the machine's speed cancels."""

    def gains(column: str) -> list[float]:
        return [mine[column] / other[column] for mine, other in zip(own, base, strict=True)]

    speed = gains("pairs_per_second")
    ratios = {
        "speed": median(speed),
        "speed_20": quantile(speed, 0.2),
        "speed_80": quantile(speed, 0.8),
        "training_speed": median(gains("training_pairs_per_second")),
        "memory": gains("peak_bytes")[0],
    }
    if own[0]["extra_bytes"] and base[0]["extra_bytes"]:
        ratios["extra_memory"] = gains("extra_bytes")[0]
    return ratios
