"""`python -m benchmarks tune KERNEL`: tile sizes and launch options of our Triton kernels, tried one against the other.

Kernels are not tuned at run time, so that two runs of a step give the same bits: what wins here is written into their
tables of configurations. Every candidate is held against float64 first; those that do not fit the device say so. Rounds
go over all candidates, ratios to the configuration in use are taken round by round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import first_line
from benchmarks.registry import Case, task_module
from benchmarks.rows import quantile
from benchmarks.worker import timed

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Kernel:
    """What can be tried of a kernel.

    suite, provider, changes:  what is timed, and how its case differs from the usual one
    current:                   () -> the configuration in use
    put:                       a configuration -> None, in its place
    candidates:                further ones, in the order of what is expected of them
    """

    suite: str
    provider: str
    changes: dict[str, Any]
    current: Callable[[], Any]
    put: Callable[[Any], None]
    candidates: Callable[[], list[Any]]


def head_fused(device: str, dtype: str) -> Kernel:
    """The fused kernel's tiles: rows, columns, hidden, warps, stages."""
    import torch

    from stepdpo_kernels.ops.linear_logprob import triton_kernel as module

    key = (*module.target_of(torch.device(device)), 8 * getattr(torch, dtype).itemsize, "plain")

    def put(config: Any) -> None:
        module.CONFIGS[key] = config

    def candidates() -> list[Any]:
        tiles = ((128, 256), (128, 128), (64, 256), (256, 128), (128, 64))
        found = itertools.product(tiles, (64, 32, 128), (8, 4), (3, 4, 2))
        return [module.Config(*shape, hidden, warps, stages) for shape, hidden, warps, stages in found]

    return Kernel("head", "ours-triton-fused", {}, lambda: module.CONFIGS[key], put, candidates)


def head_chunked(device: str, dtype: str) -> Kernel:
    """Rows of a chunk, bytes of a chunk that backward computes again, logits of a row at a time, warps."""
    from stepdpo_kernels.ops.linear_logprob import triton_chunked as module

    names = ("CHUNK_ROWS", "CHUNK_BYTES", "BLOCK", "NUM_WARPS")

    def put(values: tuple[int, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(module, name, value)

    def candidates() -> list[Any]:
        mebibytes = 2**20
        return [
            *((rows, 32 * mebibytes, 2048, 8) for rows in (2048, 4096, 512)),
            *((1024, size * mebibytes, 2048, 8) for size in (16, 64, 128)),
            *((1024, 32 * mebibytes, block, warps) for block in (1024, 4096, 8192) for warps in (4, 8, 16)),
        ]

    return Kernel(
        "head", "ours-triton-chunked", {}, lambda: tuple(getattr(module, name) for name in names), put, candidates
    )


def head_loss(device: str, dtype: str) -> Kernel:
    """Rows of dW that a product is added to at a time, where the loss of many rows sums it group by group."""
    from stepdpo_kernels.ops.linear_logprob import triton_kernel as module

    def put(rows: int) -> None:
        module.SUM_ROWS = rows

    changes = {"rows": 16_384} if device == "cuda" else {}
    return Kernel("head", "ours-loss", changes, lambda: module.SUM_ROWS, put, lambda: [2048, 4096, 8192, 512])


def attention(part: str) -> Callable[[str, str], Kernel]:
    """Tiles of one launch of tree attention: rows, keys, warps, stages; the others stay."""

    def kernel(device: str, dtype: str) -> Kernel:
        import torch

        from stepdpo_kernels.ops.linear_logprob.triton_kernel import target_of
        from stepdpo_kernels.ops.tree_attention import triton_kernel as module

        key = (*target_of(torch.device(device)), 8 * getattr(torch, dtype).itemsize, 128)

        def put(launch: Any) -> None:
            module.CONFIGS[key] = module.CONFIGS[key]._replace(**{part: launch})

        def candidates() -> list[Any]:
            found = itertools.product((64, 128), (128, 64, 32), (4, 8), (3, 2, 4))
            return [module.Launch(*values) for values in found]

        changes = {"mode": "forward"} if part == "forward" else {}
        return Kernel(
            *("attention", "ours-triton", changes, lambda: getattr(module.CONFIGS[key], part), put, candidates)
        )

    return kernel


KERNELS: dict[str, Callable[[str, str], Kernel]] = {
    "head-chunked": head_chunked,
    "head-fused": head_fused,
    "head-loss": head_loss,
    "attention-forward": attention("forward"),
    "attention-dq": attention("d_query"),
    "attention-dk": attention("d_key"),
}


def case_of(suite: str, device: str, dtype: str) -> Case:
    """The sizes that count: a 7B model's head and heads, on a CPU tiny ones."""
    if suite == "head":
        from benchmarks.suites.head import case

        return case(*(("Qwen2-7B", 4096) if device == "cuda" else ("tiny", 32)), device, dtype=dtype)
    usual = {"mode": "full", "dtype": dtype, "device": device}
    if device == "cuda":
        shape = {"lengths": "made", "branch": 64, "prefixes": 4, "pairs_per_prefix": 2, "prefix": 4096}
        return usual | shape | {"heads": "Qwen2-7B"}
    return usual | {"lengths": "real", "pairs": 2, "heads": "tiny"}


@contextmanager
def in_place(kernel: Kernel, config: Any) -> Iterator[None]:
    before = kernel.current()
    kernel.put(config)
    try:
        yield
    finally:
        kernel.put(before)


def tune(name: str, device: str, dtype: str, rounds: int, limit: int | None, left: Callable[[], float]) -> None:
    """Prints the candidates, the fastest first. left: seconds that there are."""
    kernel = KERNELS[name](device, dtype)
    case, module = case_of(kernel.suite, device, dtype) | kernel.changes, task_module(kernel.suite)
    current = kernel.current()
    configs = [current, *(c for c in kernel.candidates() if c != current)][:limit]
    seconds: dict[Any, list[float]] = {}
    refused: dict[Any, str] = {}
    with TemporaryDirectory(prefix="stepdpo-") as folder:
        module.prepare(case, Path(folder))
        task = module.load(kernel.provider, case, Path(folder))
        for config in configs:
            if left() < 0:
                break
            with in_place(kernel, config):
                try:
                    errors = module.errors(kernel.provider, case)
                    timed(task)  # compiles
                except Exception as error:  # it does not fit the device, or does not compile
                    refused[config] = first_line(error)[:100]
                    continue
            if all(error <= module.tolerance(case) for error in errors.values()):
                seconds[config] = []
            else:
                refused[config] = f"wrong: {errors}"
        for done in range(rounds):
            if done >= LEAST_ROUNDS and left() < 0:
                break
            for config, times in seconds.items():
                with in_place(kernel, config):
                    timed(task)
                    times.append(timed(task)[0])
    print_candidates(f"{name}: {case}", current, seconds, refused)


def print_candidates(
    title: str, current: Any, seconds: dict[Any, list[float]], refused: dict[Any, str], console: Console | None = None
) -> None:
    table = Table("configuration", "ms", "of the one in use", "p20", "p80", title=title, title_justify="left")
    of_current = {
        config: [a / b for a, b in zip(times, seconds.get(current, times), strict=True)]
        for config, times in seconds.items()
        if times
    }
    for config, ratios in sorted(of_current.items(), key=lambda item: median(item[1])):
        figures = (median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8))
        style = "bold" if config == current else None
        table.add_row(str(config), f"{1e3 * median(seconds[config]):.3f}", *(f"{f:.3f}" for f in figures), style=style)
    for config, why in refused.items():
        table.add_row(str(config), "", "", "", why, style="dim")
    (console or Console(width=160)).print(table)
