"""A process that computes for one provider. Reads one JSON object a line and answers each with one: {"status": "ok",
...}, or another status and a note.

    {"do": "ready"}       the device's name, when libraries are imported
    {"do": "verify"}      relative errors to float64, on a small problem of the kind of the case beside it
    {"do": "warm-up"}     its first call on the case, errors of a sample, and the peak of a second call's memory
    {"do": "measure"}     seconds of further calls
    {"do": "forget"}      lets go of the case
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch

from benchmarks.measure import PeakMemory, first_line, results_alone, volunteer
from benchmarks.registry import Task, task_module

TURN_SECONDS, TURN_CALLS = 0.3, 10  # short calls are repeated within a turn: until this long, at most this many
# Calls shorter than this are preceded by one that does not count: memory that another process has given back comes
# slowly (a third of a second for a dW of 260 MiB on a virtual machine), and calls of a training run follow each other.
UNTIMED_SECONDS = 10.0


def timed(task: Task) -> tuple[float, Any]:
    """(seconds of one call, what it returned, to be released outside of the time)"""
    gc.collect()
    began = time.perf_counter()
    outputs = task.run()
    if torch.cuda.is_initialized():  # not so where all is on the host
        torch.cuda.synchronize()
    return time.perf_counter() - began, outputs


class Worker:
    """What a process keeps between commands: the task it was told to measure."""

    def __init__(self) -> None:
        self._task: Task | None = None

    def do(self, command: str, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("threads"):
            torch.set_num_threads(message["threads"])
        commands = {"ready": self._ready, "verify": self._verify, "warm-up": self._warm_up, "measure": self._measure}
        return (commands | {"forget": self._forget})[command](message)

    def _ready(self, message: dict[str, Any]) -> dict[str, Any]:
        task_module(message["suite"])
        freeze()
        if message["device"] == "cuda":
            return {"device": torch.cuda.get_device_name()}
        return {"device": "cpu"}

    def _verify(self, message: dict[str, Any]) -> dict[str, Any]:
        module = task_module(message["suite"])
        errors = module.errors(message["provider"], message["case"])
        return {"errors": errors} | judged(errors, module.tolerance(message["case"]))

    def _warm_up(self, message: dict[str, Any]) -> dict[str, Any]:
        device = message["case"]["device"]
        task = self._task = task_module(message["suite"]).load(
            message["provider"], message["case"], Path(message["inputs"])
        )
        first, outputs = timed(task)
        value, errors = task.value(outputs), task.errors(outputs)
        wrong = judged(errors, task_module(message["suite"]).tolerance(message["case"]))
        if wrong:
            return wrong
        del outputs
        freeze()  # what the first call imported and compiled
        memory = PeakMemory(device)
        outputs = task.run()
        extra = memory.extra_bytes()
        del outputs
        give_back()
        return {
            "first_call_seconds": first,
            "extra_bytes": extra,
            "value": value,
            "facts": task.facts | errors,
            "note": task.note,
        }

    def _measure(self, _: dict[str, Any]) -> dict[str, Any]:
        assert self._task
        calls = [timed(self._task)[0]]
        if calls[0] < UNTIMED_SECONDS:
            calls = [timed(self._task)[0]]
        while sum(calls) < TURN_SECONDS and len(calls) < TURN_CALLS:
            calls.append(timed(self._task)[0])
        give_back()
        return {"seconds": median(calls)}

    def _forget(self, _: dict[str, Any]) -> dict[str, Any]:
        self.let_go()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # or the next shape would get code for shapes of any size
        return {}

    def let_go(self) -> None:
        """Of the task and of its memory."""
        self._task = None
        gc.unfreeze()  # or what refers to itself in the task would stay
        give_back()


def freeze() -> None:
    """What there is is no garbage: looking for some in all modules takes a tenth of a second before every call."""
    gc.collect()
    gc.freeze()


def judged(errors: dict[str, float], most: float) -> dict[str, str]:
    """A status and a note where one of them is more than that, or no number; empty where all is right."""
    if all(error <= most for error in errors.values()):  # not so where one is NaN
        return {}
    told = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    return {"status": "wrong", "note": f"relative to float64: {told}"}


def give_back() -> None:
    """What PyTorch's allocator keeps of the GPU's memory, which other processes have their turns with."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def what_failed(error: Exception) -> dict[str, str]:
    """Status and note of an exception that a provider raised."""
    told = first_line(error)[:300]
    if isinstance(error, ImportError):
        return {"status": "absent", "note": told}
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    if memory:
        return {"status": "out of memory", "note": told}
    # A kernel of ours that computes something wrong here refuses too, but it is at fault.
    refusal = isinstance(error, (ValueError, NotImplementedError)) and "self-test" not in str(error)
    return {"status": "refused" if refusal else "failed", "note": told}


def serve(lines: Iterable[str], results: TextIO) -> None:
    """Answers every line, until they end."""
    worker = Worker()
    for line in lines:
        message = json.loads(line)
        try:
            answer = {"status": "ok", **worker.do(message.pop("do"), message)}
        except Exception as error:
            answer = what_failed(error)
        if answer["status"] != "ok":  # other processes have their turns with this memory
            worker.let_go()
        print(json.dumps(answer), file=results, flush=True)


def main() -> None:
    volunteer()
    serve(iter(sys.stdin.readline, ""), results_alone())


if __name__ == "__main__":
    main()
