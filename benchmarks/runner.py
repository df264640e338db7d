"""Measures a workload: every provider is held against float64 first, then they take turns, each in its own process.

On CPUs a process is made for one provider and one case; on GPUs, where the allocator tells memory, it stays for all
cases of a workload, and forgets what was compiled for the case before. Processes that verify are others. Ratios are
taken round by round, so that a machine whose speed drifts favours nobody.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.environment import commit, processor, versions
from benchmarks.measure import TIMED, Worker, available_bytes, first_line
from benchmarks.registry import Case, Provider, Workload, task_module
from benchmarks.rows import Row

WORKER = "benchmarks.worker"
RESERVE_SECONDS = 20.0  # of a time limit, for what a turn takes and for the report

Answer = dict[str, Any]


@dataclass
class Context:
    """What is the same for all workloads of a run.

    rounds:     over all providers of a case
    all_rounds: also of cases that would have fewer
    threads:    of each process, on the CPU
    timeout:    seconds that one answer of a provider may take
    deadline:   when to stop, of time.monotonic; cases after it are rows that say so, answers under way are cut off
    keep:       takes the rows of each case when it is done, or interrupted
    only:       names of providers; all where empty
    dry:        Triton's kernels in its interpreter, to walk through what a GPU would run
    model, data: real weights and pairs for training steps, where they are named
    verified:   what was found so far by (suite, provider, kind)
    workers:    processes that are open; none can be opened when the run was stopped
    """

    device: str
    rounds: int
    keep: Callable[[list[Row]], None]
    threads: int
    timeout: float = 600.0
    deadline: float = float("inf")
    only: tuple[str, ...] = ()
    dry: bool = False
    model: str = ""
    data: str = ""
    device_name: str = ""
    verified: dict[tuple[Any, ...], Answer] = field(default_factory=dict)
    commit: str = field(default_factory=commit)
    workers: set[Worker] = field(default_factory=set)
    stopped: bool = False
    all_rounds: bool = False

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def rounds_of(self, case: Case) -> int:
        return self.rounds if self.all_rounds else min(self.rounds, case.get("rounds", self.rounds))

    @contextmanager
    def open(self, module: str, environment: dict[str, str]) -> Iterator[Worker]:
        """A process `python -m MODULE`, ended at the end. Raises RuntimeError when the run was stopped."""
        if self.device == "cpu":
            environment = {"CUDA_VISIBLE_DEVICES": "", **environment}  # libraries would take a GPU by themselves
        worker = Worker(module, environment)
        self.workers.add(worker)
        try:
            if self.stopped:
                raise RuntimeError("the run was stopped")
            yield worker
        finally:
            self.workers.discard(worker)
            worker.close()

    def ask(self, worker: Worker, message: dict[str, Any]) -> Answer:
        """The answer, or NOT_RUN where the deadline came first."""
        answer = worker.ask(message, min(self.timeout, max(1.0, self.left())))
        return dict(NOT_RUN) if answer["status"] == "timed out" and self.left() <= 0 else answer

    def side_by_side(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """work(item) for each, several at once: for what is not timed. An interrupt ends all processes."""
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // (1 if self.device == "cpu" else 2))) as threads:
            try:
                return list(threads.map(work, items))
            except Exception:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
            except BaseException:
                self.stopped = True
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in list(self.workers):
                    worker.kill()
                raise

    def providers(self, workload: Workload) -> list[Provider]:
        if self.dry:
            return [p for p in workload.providers if p.name in workload.dry]
        return [p for p in workload.providers if self.device in p.devices and (not self.only or p.name in self.only)]


def measure(workload: Workload, cases: list[Case], context: Context, red: str = "") -> None:
    """Hands the rows of every case to `context.keep`. red: tests that failed, so that ours is not measured."""
    providers = context.providers(workload)
    verified = verify(workload, cases, context)
    with Pool(workload, context, TIMED) as pool, folder_in_memory() as folder:
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
            except Exception as error:
                answers |= broken_off(error, answers, seconds)
                raise
            finally:  # an interrupt keeps the rounds that are complete
                context.keep(as_rows(workload, case, context, answers, seconds))
            took = time.monotonic() - began


NOT_RUN = {"status": "not run", "note": "the run ended before its turn"}


def failure(error: Exception) -> Answer:
    """Of ours: no provider is at fault."""
    return {"status": "failed", "note": first_line(error)}


def broken_off(error: Exception, answers: dict[str, Answer], turns: Mapping[str, Sequence[Any]]) -> dict[str, Answer]:
    """Answers of those who were well and have had no turn: an error ended the case, and not the clock."""
    return {n: a | failure(error) for n, a in answers.items() if a["status"] == "ok" and not turns.get(n)}


def failed_rows(workload: Workload, case: Case, context: Context, error: Exception) -> list[Row]:
    """Of a case that could not be measured at all."""
    return as_rows(workload, case, context, {p.name: failure(error) for p in context.providers(workload)}, {})


def kind_of(workload: Workload, case: Case) -> tuple[Any, ...]:
    return tuple(case[key] for key in workload.kinds)


def verify(workload: Workload, cases: list[Case], context: Context) -> dict[tuple[str, tuple[Any, ...]], Answer]:
    """Every provider's errors for each kind of case, or why there are none; what was found before is not asked."""
    kinds = {kind_of(workload, case): case for case in cases}
    providers = context.providers(workload)
    of = {(p.name, kind): (workload.suite, p.name, workload.kinds, kind) for p in providers for kind in kinds}

    def verify_provider(provider: Provider) -> None:
        for kind, case in kinds.items():
            if of[provider.name, kind] not in context.verified and context.left() > RESERVE_SECONDS:
                answer = pool.ask(provider.name, {"do": "verify", "provider": provider.name, "case": case})
                if answer["status"] != NOT_RUN["status"]:
                    context.verified[of[provider.name, kind]] = answer
        pool.close(provider.name)

    with Pool(workload, context, {}) as pool:
        context.side_by_side(verify_provider, providers)
    return {key: context.verified.get(known, NOT_RUN) for key, known in of.items()}


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
    names = [name for name, answer in answers.items() if answer["status"] == "ok"]
    for group in [[name] for name in names] if case.get("alone") else [names]:
        pool.start(group, case)
        for name in group:
            # Processes that wait hold little: what is available now is so in every turn.
            answers[name] |= too_large(workload, name, case)
            if answers[name]["status"] == "ok" and context.left() < RESERVE_SECONDS:
                answers[name] |= NOT_RUN
            if answers[name]["status"] == "ok":
                message = {"do": "warm-up", "provider": name, "case": case, "inputs": str(folder)}
                answers[name] |= pool.ask(name, message)
        running = [name for name in group if answers[name]["status"] == "ok"]
        go_round(running, context.rounds_of(case), context, pool, answers, seconds)
        for name in group:
            pool.release(name, case)


def go_round(
    names: list[str],
    rounds: int,
    context: Context,
    pool: Pool,
    answers: dict[str, Answer],
    seconds: dict[str, list[float]],
) -> None:
    for done in range(rounds):
        if done and context.left() < RESERVE_SECONDS:
            return
        for name in list(names):
            turn = pool.ask(name, {"do": "measure"})
            if turn["status"] == "ok":
                seconds.setdefault(name, []).append(turn["seconds"])
            elif turn["status"] == NOT_RUN["status"]:
                return
            else:
                answers[name] |= turn
                seconds.pop(name, None)
                names.remove(name)


class Pool:
    """A process for each provider, made when it is first asked something, with compilers' caches of its own."""

    def __init__(self, workload: Workload, context: Context, environment: dict[str, str]) -> None:
        self._workload, self._context, self._environment = workload, context, environment
        self._open: dict[str, tuple[Worker, ExitStack]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._open):
            self.close(name)

    def start(self, providers: list[str], case: Case) -> None:
        """Their processes import at the same time, and have done so when this returns."""
        self._context.side_by_side(lambda name: self._start(name, case), providers)

    def _start(self, provider: str, case: Case | None) -> Answer:
        """The answer of a new process; none is kept where it is not ok."""
        if provider in self._open:
            return {"status": "ok"}
        stack = ExitStack()
        caches = stack.enter_context(TemporaryDirectory(prefix="stepdpo-", ignore_cleanup_errors=True))
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/i", "TRITON_CACHE_DIR": f"{caches}/t", **self._environment}
        if self._context.dry:
            environment["TRITON_INTERPRET"] = "1"
        worker = stack.enter_context(self._context.open(WORKER, environment))
        self._open[provider] = worker, stack
        device = case["device"] if case else self._context.device
        ready = self._ask(worker, {"do": "ready", "device": device})
        if ready["status"] != "ok":
            self.close(provider)
        elif device != "cpu":
            self._context.device_name = ready["device"]
        return ready

    def ask(self, provider: str, message: dict[str, Any]) -> Answer:
        """The answer; where the process ended, the next question is for another one."""
        ready = self._start(provider, message.get("case"))
        if ready["status"] != "ok":
            return ready
        answer = self._ask(self._open[provider][0], message)
        if self._open[provider][0].ended:
            self.close(provider)
        return answer

    def _ask(self, worker: Worker, message: dict[str, Any]) -> Answer:
        told = {**message, "suite": self._workload.suite, "threads": self._context.threads}
        return self._context.ask(worker, told)

    def release(self, provider: str, case: Case) -> None:
        """The provider's case is done."""
        if provider not in self._open:
            return
        if case["device"] == "cuda" or self._context.dry:  # a dry run does as on a GPU
            self.ask(provider, {"do": "forget"})
        else:
            self.close(provider)

    def close(self, provider: str) -> None:
        """Ends its process, where it has one."""
        if provider in self._open:
            self._open.pop(provider)[1].close()


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
        ("of_best_peer", fastest("peer", workload, seconds, kernel=base.kernel)),
    ):
        if best:
            ratios = tuple(a / b for a, b in zip(seconds[base.provider], seconds[best], strict=False))
            rows.append(replace(base, metric=metric, unit="x", values=ratios, note=f"of {best}"))
    return rows


def fastest(role: str, workload: Workload, seconds: dict[str, list[float]], bound: str = "", kernel: str = "") -> str:
    """Of a role, and of a bound and a kernel where they are named; empty where none of them ran."""
    names = [
        p.name
        for p in workload.providers
        if p.role == role
        and p.name in seconds
        and bound in ("", p.bound)
        and kernel in ("", p.kernel or workload.kernel)
    ]
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
    told_otherwise = ("mode", "device", "rounds", workload.x, *workload.with_x)
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
        configuration=configuration | {"threads": context.threads},
        device=processor() if case["device"] == "cpu" else context.device_name,
        versions=versions(provider.package),
        commit=context.commit,
    )
