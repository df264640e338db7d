"""A run over workloads: tests, then every workload, its rows written after each case, and tables on the way."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks import gates, rows
from benchmarks.environment import environment
from benchmarks.registry import SUITES, Workload, workloads
from benchmarks.rows import Row
from benchmarks.runner import Context, Pool, kind_of
from benchmarks.runner import verify as errors_of
from benchmarks.tables import print_case, print_errors

ROUNDS = {"tiny": 2, "quick": 5, "full": 9}


def chosen(suite: str, names: list[str] | None) -> list[Workload]:
    """Raises SystemExit where a name is none."""
    found = workloads(suite)
    unknown = set(names or ()) - {workload.name for workload in found}
    if unknown:
        known = ", ".join(workload.name for workload in found)
        raise SystemExit(f"no workload {', '.join(sorted(unknown))} in suite {suite}; there are {known}")
    return [workload for workload in found if not names or workload.name in names]


def context(options: argparse.Namespace, rounds: int, deadline: float) -> Context:
    """Raises SystemExit where a provider is nobody's."""
    only = tuple(options.providers or ())
    known = {p.name: p.role for workload in workloads(options.suite) for p in workload.providers}
    if set(only) - set(known):
        raise SystemExit(f"no provider {', '.join(sorted(set(only) - set(known)))}; there are {', '.join(known)}")
    if only:
        only += tuple(name for name, role in known.items() if role == "floor")
    return Context(
        device=options.device or default_device(),
        rounds=rounds,
        keep=lambda _: None,
        threads=options.threads,
        timeout=options.timeout,
        deadline=deadline,
        only=only,
        dry=options.dry,
        model=getattr(options, "model", None) or "",
        data=getattr(options, "data", None) or "",
    )


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(chosen: list[Workload], size: str, context: Context, output: Path, tests: bool) -> None:
    """Writes `output`/SUITE.csv and environment.json; rows of workloads that are not run now stay."""
    console = Console(width=200)
    began = time.monotonic()
    red = gates.red_tests(chosen) if tests else {}
    for test, told in red.items():
        console.print(f"[red]{test}: {told}[/red]")
    for suite in SUITES:
        mine = [workload for workload in chosen if workload.suite == suite]
        if not mine:
            continue
        path = output / f"{suite}{rows.SUFFIX}"
        names = {workload.name for workload in mine}
        written = [row for row in rows.read(path) if row.workload not in names] if path.exists() else []

        def keep(found: list[Row], written: list[Row] = written, path: Path = path) -> None:
            written += found
            rows.write(path, written)
            told = environment(context.device_name)
            (output / "environment.json").write_text(json.dumps(told, indent=2) + "\n")
            print_case(found, console)

        context.keep = keep
        for workload in mine:
            if not context.providers(workload):
                continue
            cases = workload.cases(context.device, size)
            console.rule(f"{workload.name}: {workload.title} ({time.monotonic() - began:.0f} s)")
            import_module(workload.runner).measure(workload, cases, context, gates.of(workload, red))
    console.print(f"{time.monotonic() - began:.0f} s in all")


def verify(chosen: Iterable[Workload], size: str, options: argparse.Namespace) -> bool:
    """Prints every provider's errors and the tests; False where one of ours is wrong, or a test red."""
    console = Console(width=200)
    told = context(options, 0, float("inf"))
    chosen = list(chosen)
    red = gates.red_tests(chosen) if options.tests else {}
    right = not red
    for test, what in red.items():
        console.print(f"[red]{test}: {what}[/red]")
    done = set()
    for workload in chosen:
        cases = workload.cases(told.device, size)
        if workload.runner != "benchmarks.runner":
            verified = import_module(workload.runner).verify(workload, cases, told)
        else:
            fresh = {(kind_of(workload, c), workload.providers): c for c in cases}
            cases = [c for key, c in fresh.items() if key not in done]
            done |= set(fresh)
            with Pool(workload, told) as pool:
                verified = errors_of(workload, cases, told, pool)
        right &= print_errors(workload, verified, console)
    return right
