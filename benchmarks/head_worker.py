"""A process of the `head` suite. Reads one JSON object a line and answers each with one: {"status": "ok", ...}, or
another status and a note.

    {"do": "verify", "provider": ...}    its errors on a small problem of the kind that the settings beside it describe
    {"do": "warm-up", "provider": ...}   its first call on the problem of the settings, and a second one for its memory
    {"do": "measure"}                    further calls of the same, for their time
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.head_providers import BETA, PROVIDERS, Problem, Provider, branch_length, loss_of
from benchmarks.measure import PeakMemory

# A wrong formula is off by tens of percent, rounding in the dtype of the inputs by less than these.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
SMALL = (96, 1000)  # rows, vocabulary of the problem that is verified
TURN_SECONDS, TURN_CALLS = 0.5, 10  # short calls are repeated within a turn: until this long, at most this many
# Calls shorter than this are preceded by one that does not count: memory that another process has given back comes
# slowly (a third of a second for a dW of 260 MiB on a virtual machine), and calls of a training run follow each other.
UNTIMED_SECONDS = 10.0


def write_inputs(folder: Path, dtype: str, rows: int, hidden: int, vocab: int, kind: str) -> None:
    """Files `weight`, `hidden`, `target`, `upstream` of a problem; a weight of the right size is kept.

    kind "random": logits of standard deviation 1. "peaked", as after training: the target has a probability around 0.9.
    """
    of = getattr(torch, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    path = folder / "weight"
    if not path.exists() or path.stat().st_size != vocab * hidden * of.itemsize:
        with path.open("wb") as file:
            for start in range(0, vocab, 8192):
                part = torch.randn(min(8192, vocab - start), hidden, generator=generator) * hidden**-0.5
                file.write(_bytes(part.to(of)))
    weight = torch.from_file(str(path), shared=False, size=vocab * hidden, dtype=of).view(vocab, hidden)
    generator.manual_seed(1)
    target = torch.randint(vocab, (rows,), generator=generator)
    states = torch.randn(rows, hidden, generator=generator)
    if kind == "peaked":
        states += (math.log(vocab) + 3) * weight[target].float()
    upstream = torch.randn(rows, generator=generator)
    for name, tensor in (("hidden", states.to(of)), ("target", target), ("upstream", upstream)):
        (folder / name).write_bytes(_bytes(tensor))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read_problem(settings: dict[str, Any]) -> Problem:
    """The problem of `write_inputs`; on a CPU mapped, so that all workers share one copy."""
    rows, size, vocab = settings["rows"], settings["hidden"], settings["vocab"]

    def read(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        path = str(Path(settings["inputs"]) / name)
        return (
            torch.from_file(path, shared=False, size=math.prod(shape), dtype=dtype).view(shape).to(settings["device"])
        )

    of = getattr(torch, settings["dtype"])
    return Problem(
        hidden=read("hidden", of, rows, size).requires_grad_(settings["mode"] != "logp"),
        weight=read("weight", of, vocab, size).requires_grad_(settings["mode"] == "full"),
        target=read("target", torch.int64, rows),
        upstream=read("upstream", torch.float32, rows),
        length=branch_length(rows),
        mode=settings["mode"],
    )


def small_problem(settings: dict[str, Any]) -> Problem:
    """Of the same kind as the one that is measured: dtype, device, hidden size and mode."""
    generator = torch.Generator().manual_seed(2)
    rows, vocab = SMALL
    of, device = getattr(torch, settings["dtype"]), settings["device"]
    hidden, weight = (torch.randn(n, settings["hidden"], generator=generator) for n in (rows, vocab))
    weight *= settings["hidden"] ** -0.5
    target = torch.randint(vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    return Problem(
        hidden=hidden.to(device, of).requires_grad_(settings["mode"] != "logp"),
        weight=weight.to(device, of).requires_grad_(settings["mode"] == "full"),
        target=target.to(device),
        upstream=upstream.to(device),
        length=branch_length(rows),
        mode=settings["mode"],
    )


def call(provider: Provider, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(what the provider returned, its gradients)"""
    with nullcontext() if problem.leaves else torch.no_grad():
        result, loss = loss_of(provider, problem)
        if provider.objective == "products" or not problem.leaves:
            return result.detach(), ()
        return result.detach(), torch.autograd.grad(loss, problem.leaves)


def oracle(objective: str, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same in float64, from full logits, by the definition."""
    leaves = [x.detach().double().requires_grad_(x.requires_grad) for x in (problem.hidden, problem.weight)]
    logits = leaves[0] @ leaves[1].T
    logp = logits.log_softmax(dim=1).gather(1, problem.target[:, None])[:, 0]
    if objective == "rows":
        result, loss = logp, (problem.upstream.double() * logp).sum()
    elif objective == "sum":
        result = loss = -logp.sum()
    else:
        chosen, rejected = logp.view(2, -1, problem.length).sum(dim=2)
        result = loss = torch.nn.functional.softplus(-BETA * (chosen - rejected)).mean()
    wanted = [x for x in leaves if x.requires_grad]
    return result.detach(), torch.autograd.grad(loss, wanted) if wanted else ()


def verify(provider: Provider, problem: Problem) -> dict[str, float]:
    """Relative errors, in the Euclidean norm, of the result ("error"), dX and dW ("error_dx", "error_dw")."""
    if provider.objective == "products":
        return {}
    result, gradients = call(provider, problem)
    true, true_gradients = oracle(provider.objective, problem)
    errors = {}
    names = ("error", "error_dx", "error_dw")
    for name, x, y in zip(names, (result, *gradients), (true, *true_gradients), strict=False):
        if x.shape != y.shape:
            raise ValueError(f"{name} is of a result of shape {tuple(x.shape)}, and {tuple(y.shape)} is right")
        errors[name] = ((x.double() - y).norm() / y.norm()).item()
    return errors


def is_wrong(errors: dict[str, float], dtype: torch.dtype) -> bool:
    return not all(error <= TOLERANCE[dtype] for error in errors.values())  # NaN is wrong


def timed(provider: Provider, problem: Problem) -> float:
    """Seconds of one call."""
    gc.collect()
    began = time.perf_counter()
    outputs = call(provider, problem)
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del outputs  # what it returned is released outside of the time
    return seconds


def weighed(provider: Provider, problem: Problem) -> tuple[int | None, float]:
    """(bytes over those in use before, value) of one call."""
    gc.collect()
    memory = PeakMemory(problem.hidden.device.type)
    result, _ = call(provider, problem)
    extra = memory.extra_bytes()
    if provider.objective == "rows":
        result = (problem.upstream * result).sum()
    return extra, result.item()


class Worker:
    """What a process keeps between commands: the provider it was told to measure, and its problem."""

    def __init__(self) -> None:
        self._provider = PROVIDERS["eager"]
        self._problem: Problem | None = None

    def do(self, command: str, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("threads"):
            torch.set_num_threads(settings["threads"])
        return {"verify": self._verify, "warm-up": self._warm_up, "measure": self._measure}[command](settings)

    def _verify(self, settings: dict[str, Any]) -> dict[str, Any]:
        provider, device = PROVIDERS[settings["provider"]], settings["device"]
        if device not in provider.devices:
            raise ValueError(f"runs on {' and '.join(provider.devices)}, not on {device}")
        errors = verify(provider, small_problem(settings))
        if is_wrong(errors, getattr(torch, settings["dtype"])):
            told = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
            return {"status": "wrong", "note": f"relative to float64: {told}", **errors}
        return errors

    def _warm_up(self, settings: dict[str, Any]) -> dict[str, Any]:
        provider = self._provider = PROVIDERS[settings["provider"]]
        problem = self._problem = read_problem(settings)
        first = timed(provider, problem)
        extra, value = weighed(provider, problem)
        note = "; ".join(filter(None, (provider.note, provider.took(problem) if provider.took else "")))
        name = torch.cuda.get_device_name() if settings["device"] == "cuda" else settings["device"]
        return {"first_call_seconds": first, "extra_bytes": extra, "loss": value, "note": note, "device": name}

    def _measure(self, settings: dict[str, Any]) -> dict[str, Any]:
        assert self._problem
        calls = [timed(self._provider, self._problem)]
        if calls[0] < UNTIMED_SECONDS:
            calls = [timed(self._provider, self._problem)]
        while sum(calls) < TURN_SECONDS and len(calls) < TURN_CALLS:
            calls.append(timed(self._provider, self._problem))
        return {"seconds": median(calls)}


def what_failed(error: Exception) -> dict[str, str]:
    """Status and note of an exception that a provider raised."""
    told = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if isinstance(error, ImportError):
        return {"status": "absent", "note": told}
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    if memory:
        return {"status": "out of memory", "note": told}
    refusal = isinstance(error, (ValueError, NotImplementedError, AssertionError))
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
        print(json.dumps(answer), file=results, flush=True)


def main() -> None:
    # If memory runs out nevertheless, the kernel should take this process and no other.
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the results
    serve(iter(sys.stdin.readline, ""), results)


if __name__ == "__main__":
    main()
