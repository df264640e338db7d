"""Measures a workload: every provider is held against float64 first, then they take turns, each in its own process.

On CPUs a process is made for one provider and one case; on GPUs, where the allocator tells memory, it stays for all
cases of a workload. Ratios are taken round by round, so that a machine whose speed drifts favours nobody.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.environment import commit, processor, versions
from benchmarks.measure import Worker, available_bytes
from benchmarks.registry import Case, Provider, Workload, task_module
from benchmarks.rows import Row

WORKER = "benchmarks.worker"
RESERVE_SECONDS = 20.0  # of a time limit, for what a turn takes and for the report
LEAST_ROUNDS = 3

Answer = dict[str, Any]


@dataclass
class Context:
    """What is the same for all workloads of a run.

    rounds:     over all providers of a case
    timeout:    seconds that one answer of a provider may take
    deadline:   when to stop, of time.monotonic; cases after it are rows that say so
    keep:       takes the rows of each case when it is done, or interrupted
    only:       names of providers; all where empty
    dry:        Triton's kernels in its interpreter, to walk through what a GPU would run
    model, data: real weights and pairs for training steps, where they are named
    verified:   what was found so far by (suite, provider, kind)
    """

    device: str
    rounds: int
    keep: Callable[[list[Row]], None]
    threads: int = 0
    timeout: float = 600.0
    deadline: float = float("inf")
    only: tuple[str, ...] = ()
    dry: bool = False
    model: str = ""
    data: str = ""
    device_name: str = ""
    verified: dict[tuple[Any, ...], Answer] = field(default_factory=dict)
    commit: str = field(default_factory=commit)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def providers(self, workload: Workload) -> list[Provider]:
        if self.dry:
            return [p for p in workload.providers if p.name in workload.dry]
        return [p for p in workload.providers if self.device in p.devices and (not self.only or p.name in self.only)]


def measure(workload: Workload, cases: list[Case], context: Context, red: str = "") -> None:
    """Hands the rows of every case to `context.keep`. red: tests that failed, so that ours is not measured."""
    providers = context.providers(workload)
    with ExitStack() as stack:
        pool = stack.enter_context(Pool(workload, context))
        verified = verify(workload, cases, context, pool)
        folder = stack.enter_context(folder_in_memory())
        took = 0.0
        for case in cases:
            answers = {p.name: dict(verified[p.name, kind_of(workload, case)]) for p in providers}
            for provider in providers:
                if red and provider.role == "ours":
                    answers[provider.name] = {"status": "wrong", "note": f"tests failed: {red}"}
            began = time.monotonic()
            if context.left() < max(RESERVE_SECONDS, took):
                answers |= {name: NOT_RUN for name, answer in answers.items() if answer["status"] == "ok"}
                context.keep(as_rows(workload, case, context, answers, {}))
                continue
            task_module(workload.suite).prepare(case, folder)
            seconds: dict[str, list[float]] = {}
            try:
                take_turns(workload, case, context, pool, folder, answers, seconds)
            finally:  # an interrupt keeps the rounds that are complete
                context.keep(as_rows(workload, case, context, answers, seconds))
            took = time.monotonic() - began


NOT_RUN = {"status": "not run", "note": "the run ended before its turn"}


def kind_of(workload: Workload, case: Case) -> tuple[Any, ...]:
    return tuple(case[key] for key in workload.kinds)


def verify(
    workload: Workload, cases: list[Case], context: Context, pool: Pool
) -> dict[tuple[str, tuple[Any, ...]], Answer]:
    """Every provider's errors for each kind of case, or why there are none. Several at once: nothing is timed."""
    kinds = {kind_of(workload, case): case for case in cases}
    providers = context.providers(workload)
    of = {(p.name, kind): (workload.suite, p.name, workload.kinds, kind) for p in providers for kind in kinds}

    def verify_provider(provider: Provider) -> None:
        for kind, case in kinds.items():
            if of[provider.name, kind] not in context.verified:
                message = {"do": "verify", "provider": provider.name, "case": case}
                context.verified[of[provider.name, kind]] = pool.ask(provider.name, message)
        pool.release(provider.name)

    with ThreadPoolExecutor(at_once(context)) as threads:
        list(threads.map(verify_provider, providers))
    return {key: context.verified[known] for key, known in of.items()}


def at_once(context: Context) -> int:
    """Processes that may be busy where nothing is timed."""
    return max(1, (os.cpu_count() or 2) // (1 if context.device == "cpu" else 2))


def take_turns(
    workload: Workload,
    case: Case,
    context: Context,
    pool: Pool,
    folder: Path,
    answers: dict[str, Answer],
    seconds: dict[str, list[float]],
) -> None:
    """Fills in what each provider answers, and the seconds of its rounds."""
    pool.start([name for name, answer in answers.items() if answer["status"] == "ok"])
    for name, answer in answers.items():
        if answer["status"] == "ok":
            # Processes that wait hold little: what is available now is so in every turn.
            answer |= too_large(workload, name, case)
        if answer["status"] == "ok" and context.left() < RESERVE_SECONDS:
            answer |= NOT_RUN
        if answer["status"] == "ok":
            message = {"do": "warm-up", "provider": name, "case": case, "inputs": str(folder)}
            answer |= pool.ask(name, message)
            if answer["status"] == "ok":
                seconds[name] = []
    for done in range(context.rounds):
        if done >= LEAST_ROUNDS and context.left() < RESERVE_SECONDS:
            break
        for name in list(seconds):
            turn = pool.ask(name, {"do": "measure"})
            if turn["status"] == "ok":
                seconds[name].append(turn["seconds"])
            else:
                answers[name] |= turn
                del seconds[name]
    for name in answers:
        pool.release(name)


class Pool:
    """A process for each provider, made when it is first asked something."""

    def __init__(self, workload: Workload, context: Context) -> None:
        self._workload, self._context = workload, context
        self._open: dict[str, tuple[Worker, ExitStack]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._open):
            self._close(name)

    def start(self, providers: list[str]) -> None:
        """Their processes import at the same time, and have done so when this returns."""
        with ThreadPoolExecutor(at_once(self._context)) as threads:
            list(threads.map(self._start, providers))

    def _start(self, provider: str) -> Answer:
        """The answer of a new process; none is kept where it is not ok."""
        if provider in self._open:
            return {"status": "ok"}
        stack = ExitStack()
        worker = stack.enter_context(new_worker(self._context))
        self._open[provider] = worker, stack
        ready = self._ask(worker, {"do": "ready", "device": self._context.device})
        if ready["status"] != "ok":
            self._close(provider)
        else:
            self._context.device_name = ready["device"] if self._context.device == "cuda" else processor()
        return ready

    def ask(self, provider: str, message: dict[str, Any]) -> Answer:
        """The answer; where the process ended, the next question is for another one."""
        ready = self._start(provider)
        if ready["status"] != "ok":
            return ready
        answer = self._ask(self._open[provider][0], message)
        if self._open[provider][0].ended:
            self._close(provider)
        return answer

    def _ask(self, worker: Worker, message: dict[str, Any]) -> Answer:
        return worker.ask({**message, "suite": self._workload.suite, "threads": self._context.threads})

    def release(self, provider: str) -> None:
        """The provider's case is done."""
        if provider not in self._open:
            return
        if self._context.device == "cuda":
            self.ask(provider, {"do": "forget"})
        else:
            self._close(provider)

    def _close(self, provider: str) -> None:
        worker, stack = self._open.pop(provider)
        worker.close()
        stack.close()


@contextmanager
def new_worker(context: Context) -> Iterator[Worker]:
    """A process with compilers' caches of its own, empty ones."""
    with TemporaryDirectory(prefix="stepdpo-", ignore_cleanup_errors=True) as caches:
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/i", "TRITON_CACHE_DIR": f"{caches}/t"}
        if context.dry:
            environment["TRITON_INTERPRET"] = "1"
        yield Worker(WORKER, context.timeout, environment)


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A temporary folder, in memory where there is room for large inputs: no disk in what is timed."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    with TemporaryDirectory(dir=memory if fits else None, prefix="stepdpo-") as folder:
        yield Path(folder)


def too_large(workload: Workload, provider: str, case: Case) -> dict[str, str]:
    """A status where the provider would take more memory than there is; on CUDA the allocator tells."""
    available = available_bytes()
    if case["device"] != "cpu" or available is None:
        return {}
    needed = task_module(workload.suite).needs(provider, case)
    if needed <= 0.9 * available:
        return {}
    told = f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are available"
    return {"status": "out of memory (estimated)", "note": told}


def as_rows(
    workload: Workload,
    case: Case,
    context: Context,
    answers: dict[str, Answer],
    seconds: dict[str, list[float]],
) -> list[Row]:
    """All metrics of all providers on one case."""
    rows: list[Row] = []
    seconds = {name: times for name, times in seconds.items() if times}
    for provider in context.providers(workload):
        answer, base = answers[provider.name], row_of(workload, provider, case, context)
        status = answer["status"]
        if provider.name not in seconds:
            status = NOT_RUN["status"] if status == "ok" else status
            note = answer.get("note", "") or (NOT_RUN["note"] if status == "not run" else "")
            rows.append(replace(base, metric="seconds", unit="s", status=status, note=note))
        else:
            times = tuple(seconds[provider.name])
            rows.append(replace(base, metric="seconds", unit="s", values=times, note=answer.get("note", "")))
            rows += ratio_rows(base, workload, seconds)
            rows += [replace(base, metric=m, unit=unit, values=(v,)) for m, unit, v in once(answer)]
        for name, error in answer.get("errors", {}).items():
            rows.append(replace(base, metric=name, unit="1", values=(error,), note="relative, to float64"))
    return rows


def ratio_rows(base: Row, workload: Workload, seconds: dict[str, list[float]]) -> list[Row]:
    """Of `base`'s provider to the floor and to the fastest peer of the case, round by round."""
    rows = []
    for metric, best in (
        ("of_floor", floor_of(workload, seconds)),
        ("of_best_peer", fastest("peer", workload, seconds)),
    ):
        if best:
            ratios = tuple(a / b for a, b in zip(seconds[base.provider], seconds[best], strict=False))
            rows.append(replace(base, metric=metric, unit="x", values=ratios, note=f"of {best}"))
    return rows


def fastest(role: str, workload: Workload, seconds: dict[str, list[float]], bound: str = "") -> str:
    """Of a role, and of a bound where one is named; empty where none of them ran."""
    names = [p.name for p in workload.providers if p.role == role and p.name in seconds and bound in ("", p.bound)]
    return min(names, key=lambda name: median(seconds[name]), default="")


def floor_of(workload: Workload, seconds: dict[str, list[float]]) -> str:
    """The fastest way to each bound, and of these the slowest."""
    bounds = dict.fromkeys(p.bound for p in workload.providers if p.role == "floor")
    names = filter(None, (fastest("floor", workload, seconds, bound) for bound in bounds))
    return max(names, key=lambda name: median(seconds[name]), default="")


def once(answer: Answer) -> Iterator[tuple[str, str, float]]:
    """(metric, unit, value) of what is measured or counted once."""
    yield "first_call_seconds", "s", answer["first_call_seconds"]
    facts = dict(answer["facts"])
    extra, result = answer["extra_bytes"], facts.pop("result_bytes", None)
    if extra is not None:
        yield "extra_bytes", "B", float(extra)
        if result is not None:
            yield "beside_results_bytes", "B", extra - result
    if answer["value"] is not None:
        yield "value", "1", answer["value"]
    for name, value in facts.items():
        yield name, "B" if name.endswith("_bytes") else "1", value


def row_of(workload: Workload, provider: Provider, case: Case, context: Context) -> Row:
    told_otherwise = ("mode", "device", "rounds", "alone", workload.x)
    configuration = {k: v for k, v in case.items() if k not in told_otherwise}
    return Row(
        workload=workload.name,
        kernel=provider.kernel or workload.kernel,
        provider=provider.name,
        role=provider.role,
        mode=case["mode"],
        metric="",
        unit="",
        x_name=workload.x,
        x=float(case[workload.x]),
        values=(),
        configuration=configuration | {"threads": context.threads or os.cpu_count()},
        device=context.device_name,
        versions=versions(provider.package),
        commit=context.commit,
    )
