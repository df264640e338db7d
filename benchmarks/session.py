"""A run over workloads: tests, then every workload, its rows written after each case, and tables on the way."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks import gates, rows
from benchmarks.environment import environment
from benchmarks.registry import SUITES, Workload, workloads
from benchmarks.rows import Row
from benchmarks.runner import Context, failed_rows
from benchmarks.tables import print_case, print_errors

ROUNDS = {"tiny": 2, "quick": 7, "full": 9}


def chosen(suite: str, names: list[str] | None) -> list[Workload]:
    """Raises SystemExit where a name is none."""
    found = workloads(suite)
    unknown = set(names or ()) - {workload.name for workload in found}
    if unknown:
        known = ", ".join(workload.name for workload in found)
        raise SystemExit(f"no workload {', '.join(sorted(unknown))} in suite {suite}; there are {known}")
    return [workload for workload in found if not names or workload.name in names]


def context(options: argparse.Namespace, rounds: int, deadline: float) -> Context:
    """rounds: where the options name none. Raises SystemExit where a provider is nobody's."""
    import torch

    only = tuple(options.providers or ())
    known = {p.name: p.role for workload in workloads(options.suite) for p in workload.providers}
    if set(only) - set(known):
        raise SystemExit(f"no provider {', '.join(sorted(set(only) - set(known)))}; there are {', '.join(known)}")
    if only:
        only += tuple(name for name, role in known.items() if role == "floor")
    return Context(
        device=options.device or default_device(),
        rounds=getattr(options, "rounds", None) or rounds,
        all_rounds=bool(getattr(options, "rounds", None)),
        keep=lambda _: None,
        threads=options.threads or torch.get_num_threads(),
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


def run(chosen: list[Workload], size: str, context: Context, output: Path, tests: bool) -> list[str]:
    """Writes `output`/SUITE.csv and environment.json; rows of an earlier run stay until their workload has new ones.

    tests: run those that figures of ours depend on
    Returns what failed: workloads that could not be measured to their end, and those of ours that are wrong or failed.
    """
    console = Console(width=200)
    began = time.monotonic()
    failed = []
    red = gates.red_tests(chosen, context.left()) if tests else {}
    print_red(red, console)
    for suite in SUITES:
        mine = [workload for workload in chosen if workload.suite == suite]
        if not mine:
            continue
        path = output / f"{suite}{rows.SUFFIX}"
        written = rows.read(path) if path.exists() else []
        done: Counter[str] = Counter()  # cases of each workload

        def keep(found: list[Row], written: list[Row] = written, path: Path = path, done: Counter[str] = done) -> None:
            name = found[0].workload
            if not done[name]:
                written[:] = [row for row in written if row.workload != name]
            done[name] += 1
            written += found
            rows.write(path, written)
            told = environment(context.device_name)
            (output / "environment.json").write_text(json.dumps(told, indent=2) + "\n")
            print_case(found, console)
            failed.extend(at_fault(found))

        context.keep = keep
        for workload in mine:
            if not context.providers(workload):
                continue
            cases = workload.cases(context.device, size)
            console.rule(f"{workload.name}: {workload.title} ({time.monotonic() - began:.0f} s)")
            try:
                import_module(workload.runner).measure(workload, cases, context, gates.of(workload, red))
            except Exception as error:  # what was measured stays, and the other workloads have their turns
                console.print(traceback.format_exc(), markup=False)
                failed.append(f"{workload.name} could not be measured to its end")
                for case in cases[done[workload.name] :]:
                    keep(failed_rows(workload, case, context, error))
    console.print(f"{time.monotonic() - began:.0f} s in all")
    return list(dict.fromkeys(failed))


def verify(chosen: Iterable[Workload], size: str, options: argparse.Namespace) -> bool:
    """Prints every provider's errors and the tests; False where one of ours is wrong, or a test red."""
    console = Console(width=200)
    told = context(options, 0, float("inf"))
    chosen = list(chosen)
    red = gates.red_tests(chosen, told.left()) if options.tests else {}
    right = not red
    print_red(red, console)
    for workload in chosen:
        cases = workload.cases(told.device, size)
        verified = import_module(workload.runner).verify(workload, cases, told)
        right &= print_errors(workload, verified, console)
    return right


def print_red(red: dict[str, str], console: Console) -> None:
    for test, told in red.items():
        console.print(f"{test}: {told}", style="red", markup=False)


def at_fault(found: Iterable[Row]) -> list[str]:
    """Of a case: what of ours has no figure though nothing kept it from running."""
    return [
        f"{row.provider} of {row.workload}: {row.status}"
        for row in found
        if row.metric == "seconds" and row.role == "ours" and row.status in ("wrong", "failed", "timed out")
    ]
