"""The `head` suite: log-probs of target tokens from hidden states, and the preference loss on them.

A provider's result and gradients are first held against float64 on a small problem; what is wrong is not measured. For
each problem (dtype, vocabulary V, rows R, mode) every provider then gets a process of its own: one call to warm up,
compilation included, then rounds over all providers in turn. Ratios are taken round by round to the plain matrix
products, the floor. Inputs are written once, and mapped by all processes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.head_providers import MODES, OURS, PROVIDERS
from benchmarks.head_worker import write_inputs
from benchmarks.measure import Worker, available_bytes, quantile, write_rows

WORKER = "benchmarks.head_worker"
FLOOR = "products"
DTYPES = ("bfloat16", "float32", "float16")
COLUMNS = (
    *("kernel", "provider", "mode", "dtype", "rows", "hidden", "vocab", "inputs", "device", "threads"),
    *("status", "seconds", "seconds_20", "seconds_80", "of_products", "of_products_20", "of_products_80"),
    *("first_call_seconds", "extra_bytes", "gradient_bytes", "rounds", "loss", "error", "error_dx", "error_dw", "note"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("head", "every combination of these is a problem").add_argument
    add("--rows", type=even, nargs="+", default=[1024], help="loss rows R, even: 128 1024 8192 ...")
    add("--vocab", type=int, nargs="+", default=[151936], help="vocabulary V: 49152 128256 151936 ...")
    add("--hidden", type=int, default=896, help="hidden size D")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"], help="of hidden and weight")
    add("--modes", nargs="+", choices=MODES, default=["full"], help="full: dX, dW; frozen: dX; logp: no gradient")
    add("--inputs", choices=["random", "peaked"], default="random", help="peaked: targets likely, as after training")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--providers", nargs="+", choices=list(PROVIDERS), metavar="NAME", help=f"of: {', '.join(PROVIDERS)}")
    add("--repeats", type=int, default=5, help="rounds over all providers, interleaved")
    add("--timeout", type=float, default=300, help="seconds that one turn of a provider may take")


def even(text: str) -> int:
    rows = int(text)
    if rows < 2 or rows % 2:
        raise argparse.ArgumentTypeError(f"rows come in pairs of branches: {rows} is not an even number of at least 2")
    return rows


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table for each problem and writes a row for each provider."""
    providers = arguments.providers or [n for n, p in PROVIDERS.items() if arguments.device in p.devices]
    common = {name: getattr(arguments, name) for name in ("hidden", "device", "threads")}
    written: list[dict[str, Any]] = []
    verified: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for dtype, vocab in product(arguments.dtypes, arguments.vocab):
        size = (vocab + max(arguments.rows)) * arguments.hidden * getattr(torch, dtype).itemsize
        with folder_in_memory(size) as inputs:
            for rows, mode in product(arguments.rows, arguments.modes):
                problem = {**common, "dtype": dtype, "vocab": vocab, "rows": rows, "mode": mode, "inputs": str(inputs)}
                write_inputs(inputs, dtype, rows, arguments.hidden, vocab, arguments.inputs)
                if (dtype, mode) not in verified:
                    verified[dtype, mode] = verify(problem, providers, arguments.timeout)
                measured = measure(problem, verified[dtype, mode], arguments.repeats, arguments.timeout)
                for row in measured:
                    row["inputs"] = arguments.inputs
                written += measured
                write_rows(arguments.output, written)  # an interrupted run leaves what it has
                print_table(measured)


@contextmanager
def folder_in_memory(size: int) -> Iterator[Path]:
    """A temporary folder for files of `size` bytes, in memory where there is room: no disk in what is timed."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * size + 2**20
    with TemporaryDirectory(dir=memory if fits else None, prefix="stepdpo-") as folder:
        yield Path(folder)


@contextmanager
def new_worker(timeout: float) -> Iterator[Worker]:
    """A process with compilers' caches of its own, empty ones."""
    with TemporaryDirectory(prefix="stepdpo-", ignore_cleanup_errors=True) as caches:
        worker = Worker(WORKER, timeout, {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/i", "TRITON_CACHE_DIR": f"{caches}/t"})
        try:
            yield worker
        finally:
            worker.close()


def verify(problem: dict[str, Any], providers: list[str], timeout: float) -> dict[str, dict[str, Any]]:
    """What each provider's errors are, or why there are none."""
    answers: dict[str, dict[str, Any]] = {}
    while len(answers) < len(providers):  # another process only where one broke down
        with new_worker(timeout) as worker:
            for name in providers[len(answers) :]:
                answers[name] = worker.ask({"do": "verify", "provider": name, **problem})
                if worker.ended:
                    break
    return answers


def measure(
    problem: dict[str, Any], verified: dict[str, dict[str, Any]], repeats: int, timeout: float
) -> list[dict[str, Any]]:
    """One row a provider: those that are right warm up, and go on in rounds as long as they run."""
    answers = {name: dict(answer) for name, answer in verified.items()}
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, answer in answers.items():
            if answer["status"] == "ok":
                # Processes that wait hold little: what is available now is so in every turn.
                answer |= too_large(name, problem)
            if answer["status"] == "ok":
                worker = stack.enter_context(new_worker(timeout))
                answer |= worker.ask({"do": "warm-up", "provider": name, **problem})
                if answer["status"] == "ok":
                    workers[name], seconds[name] = worker, []
                else:
                    worker.close()
        for _ in range(repeats):
            for name in list(workers):
                turn = workers[name].ask({"do": "measure"})
                if turn["status"] == "ok":
                    seconds[name].append(turn["seconds"])
                else:
                    answers[name] |= turn
                    workers.pop(name).close()
                    del seconds[name]
    return [as_row(name, problem, answers[name], seconds) for name in answers]


def gradient_bytes(problem: dict[str, Any]) -> int:
    """Of dX and dW, as far as the mode has them."""
    rows = {"full": problem["rows"] + problem["vocab"], "frozen": problem["rows"], "logp": 0}[problem["mode"]]
    return rows * problem["hidden"] * getattr(torch, problem["dtype"]).itemsize


def too_large(provider: str, problem: dict[str, Any]) -> dict[str, str]:
    """A status where the provider would take more memory than there is; on CUDA the allocator tells."""
    available = available_bytes()
    if problem["device"] != "cpu" or available is None:
        return {}
    logits = PROVIDERS[provider].logits * problem["rows"] * problem["vocab"] * 4
    accumulator = problem["vocab"] * problem["hidden"] * 4 if problem["mode"] == "full" else 0
    needed = logits + accumulator + gradient_bytes(problem)
    if needed <= 0.9 * available:
        return {}
    told = f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are available"
    return {"status": "out of memory (estimated)", "note": told}


def as_row(
    name: str, problem: dict[str, Any], answer: dict[str, Any], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {key: problem[key] for key in ("mode", "dtype", "rows", "hidden", "vocab", "device", "threads")}
    row |= {key: value for key, value in answer.items() if key in COLUMNS}
    row |= {"provider": name, "gradient_bytes": gradient_bytes(problem)}
    row["kernel"] = "preference_loss" if PROVIDERS[name].objective == "pairs" else "linear_logprob"
    if name not in seconds:
        return row | dict.fromkeys(("first_call_seconds", "extra_bytes", "loss"))
    figures = {"seconds": seconds[name]}
    if FLOOR in seconds:
        figures["of_products"] = [s / floor for s, floor in zip(seconds[name], seconds[FLOOR], strict=True)]
    for column, values in figures.items():
        row |= {column: median(values), f"{column}_20": quantile(values, 0.2), f"{column}_80": quantile(values, 0.8)}
    return row | {"rounds": len(seconds[name])}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One problem's rows, the fastest first, and how `ours` stands to the floor and to the fastest peer."""
    of = rows[0]
    title = (
        f"{of['dtype']}, R {of['rows']:,}, D {of['hidden']:,}, V {of['vocab']:,}, {of['mode']}, {of['inputs']} inputs"
    )
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("provider", no_wrap=True)
    for heading in ("ms", "p20", "p80", "x products", "first call s", "extra MiB", "- dX, dW", "error, dX, dW"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", ratio=1)
    for row in sorted(rows, key=lambda row: row["seconds"] or float("inf")):
        errors = [row[key] for key in ("error", "error_dx", "error_dw")]
        memory = row["extra_bytes"]
        if row["seconds"] is None:
            figures = ["-"] * 7
        else:
            times = [f"{1000 * row[key]:,.1f}" for key in ("seconds", "seconds_20", "seconds_80")]
            ratio = "-" if row["of_products"] is None else f"{row['of_products']:.2f}"
            over = (
                ["-", "-"]
                if memory is None
                else [f"{m / 2**20:,.0f}" for m in (memory, memory - row["gradient_bytes"])]
            )
            figures = [*times, ratio, f"{row['first_call_seconds']:.1f}", *over]
        told = "; ".join(filter(None, (row["status"] if row["status"] != "ok" else "", row["note"])))
        table.add_row(row["provider"], *figures, " ".join(f"{e:.0e}" for e in errors if e is not None), told)
    table.caption = verdict(rows)
    Console(width=200).print(table)


def verdict(rows: list[dict[str, Any]]) -> str:
    ran = {row["provider"]: row for row in rows if row["seconds"] is not None}
    peers = [row for name, row in ran.items() if name not in OURS and PROVIDERS[name].objective != "products"]
    if "ours" not in ran:
        return "ours did not run"
    told = []
    if ran["ours"]["of_products"] is not None:
        told.append(f"{ran['ours']['of_products']:.2f}x the time of the products")
    if peers:
        best = min(peers, key=lambda row: row["seconds"])
        told.append(f"{ran['ours']['seconds'] / best['seconds']:.2f}x that of {best['provider']}, the fastest peer")
    return f"ours: {', '.join(told)}" if told else ""
