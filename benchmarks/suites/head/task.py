"""What a process does for a provider of the `head` suite."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.registry import Case
from benchmarks.suites.head.providers import BETA, WAYS, Problem, Way, branch_length, loss_of

# A wrong formula is off by tens of percent, rounding in the dtype of the inputs by less than these.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 1e-2}
PEAKED = 4.0  # times as much: log-probs are near 0, and logits near 14 are rounded, by up to 0.03 in bfloat16
SMALL = (96, 1000)  # rows, vocabulary of the problem that is verified
SAMPLE = 64  # rows of the problem that is measured of which float64 is known
COLUMNS = 8192  # of W that are made or read at once


def prepare(case: Case, folder: Path) -> None:
    write_inputs(folder, case["dtype"], case["rows"], case["hidden"], case["vocab"], case["inputs"])
    write_sample(folder, read_problem({**case, "device": "cpu", "mode": "logp"}, folder))


def tolerance(case: Case) -> float:
    return TOLERANCE[case["dtype"]] * (PEAKED if case["inputs"] == "peaked" else 1)


def errors(provider: str, case: Case) -> dict[str, float]:
    return verify(WAYS[provider], small_problem(case))


def needs(provider: str, case: Case) -> int:
    way = WAYS[provider]
    logits = way.logits * case["rows"] * case["vocab"] * 4
    sums = case["vocab"] * case["hidden"] * 4 if way.sums and case["mode"] == "full" else 0
    return int(logits) + sums + gradient_bytes(case)


def gradient_bytes(case: Case) -> int:
    """Of dX and dW, as far as the mode has them."""
    rows = {"full": case["rows"] + case["vocab"], "frozen": case["rows"], "logp": 0}[case["mode"]]
    return rows * case["hidden"] * getattr(torch, case["dtype"]).itemsize


def load(provider: str, case: Case, folder: Path) -> Head:
    return Head(WAYS[provider], read_problem(case, folder), gradient_bytes(case), read_sample(case, folder))


class Head:
    """Log-probs or loss and their gradients, from inputs that are there."""

    def __init__(self, way: Way, problem: Problem, result_bytes: int, sample: tuple[Tensor, Tensor]) -> None:
        self._way, self._problem, self._sample = way, problem, sample
        self.facts = {"result_bytes": float(result_bytes)}

    @property
    def note(self) -> str:
        return self._way.took(self._problem) if self._way.took else ""

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return call(self._way, self._problem)

    def value(self, outputs: tuple[Tensor, tuple[Tensor, ...]]) -> float:
        result = outputs[0]
        return ((self._problem.upstream * result).sum() if self._way.objective == "rows" else result).item()

    def errors(self, outputs: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, float]:
        """Of a sample's log-probs and dX; of dW by <dX, X> = <dW, W>, which holds for any loss of the logits."""
        result, gradients = outputs
        if self._way.objective == "products":
            return {}
        found = {}
        if self._way.objective == "rows":
            rows = sampled(len(result)).to(result.device)
            got = (result, *gradients)[:2]
            for name, x, y in zip(("error_sample", "error_dx_sample"), got, self._sample, strict=False):
                found[name] = relative(x[rows].cpu(), y)
        if len(gradients) == 2:
            found["error_dw_sum"] = disagreement(*gradients, self._problem)
        return found


def disagreement(dx: Tensor, dw: Tensor, problem: Problem) -> float:
    """|<dX, X> - <dW, W>| over the length of the vector of rows' <dX_r, X_r>."""
    of_rows = (dx.double() * problem.hidden.detach().double()).sum(dim=1)
    parts = zip(dw.split(COLUMNS), problem.weight.detach().split(COLUMNS), strict=True)
    of_weight = sum((a.double() * b.double()).sum() for a, b in parts)
    return float((of_rows.sum() - of_weight).abs() / of_rows.norm())


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
            for start in range(0, vocab, COLUMNS):
                part = torch.randn(min(COLUMNS, vocab - start), hidden, generator=generator) * hidden**-0.5
                file.write(_bytes(part.to(of)))
    weight = torch.from_file(str(path), shared=False, size=vocab * hidden, dtype=of).view(vocab, hidden)
    generator.manual_seed(1)
    target = torch.randint(vocab, (rows,), generator=generator)
    states = torch.randn(rows, hidden, generator=generator)
    if kind == "peaked":
        states += peak(weight, target)
    upstream = torch.randn(rows, generator=generator)
    for name, tensor in (("hidden", states.to(of)), ("target", target), ("upstream", upstream)):
        (folder / name).write_bytes(_bytes(tensor))


def peak(weight: Tensor, target: Tensor) -> Tensor:
    """(R, D), what makes hidden states name their targets."""
    return (math.log(len(weight)) + 3) * weight[target].float()


def sampled(rows: int) -> Tensor:
    """Some of them, the first and the last among them."""
    return torch.linspace(0, rows - 1, min(SAMPLE, rows)).long()


def write_sample(folder: Path, problem: Problem) -> None:
    """Files `sample_logp` (S,) and `sample_dx` (S, D), float64, by the definition."""
    rows = sampled(len(problem.target))
    hidden, target = problem.hidden[rows].double(), problem.target[rows][:, None]
    logits = torch.cat([hidden @ part.double().T for part in problem.weight.split(COLUMNS)], dim=1)
    logps = logits.log_softmax(dim=1)
    of_logits = -logps.exp()
    of_logits.scatter_add_(1, target, torch.ones_like(of_logits[:, :1]))
    of_logits *= problem.upstream[rows].double()[:, None]
    parts = zip(of_logits.split(COLUMNS, dim=1), problem.weight.split(COLUMNS), strict=True)
    dx = sum((g @ part.double() for g, part in parts), torch.zeros_like(hidden))
    (folder / "sample_logp").write_bytes(_bytes(logps.gather(1, target)[:, 0]))
    (folder / "sample_dx").write_bytes(_bytes(dx))


def read_sample(case: Case, folder: Path) -> tuple[Tensor, Tensor]:
    count = min(SAMPLE, case["rows"])

    def read(name: str, *shape: int) -> Tensor:
        path = str(folder / name)
        return torch.from_file(path, shared=False, size=math.prod(shape), dtype=torch.float64).view(shape)

    return read("sample_logp", count), read("sample_dx", count, case["hidden"])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read_problem(settings: Case, folder: Path) -> Problem:
    """The problem of `write_inputs`; on a CPU mapped, so that all workers share one copy."""
    rows, size, vocab = settings["rows"], settings["hidden"], settings["vocab"]

    def read(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        path = str(folder / name)
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


def small_problem(settings: Case) -> Problem:
    """Of the same kind as the one that is measured: dtype, device, hidden size, mode and inputs."""
    generator = torch.Generator().manual_seed(2)
    rows, vocab = SMALL
    of, device = getattr(torch, settings["dtype"]), settings["device"]
    hidden, weight = (torch.randn(n, settings["hidden"], generator=generator) for n in (rows, vocab))
    weight *= settings["hidden"] ** -0.5
    target = torch.randint(vocab, (rows,), generator=generator)
    if settings["inputs"] == "peaked":
        hidden += peak(weight, target)
    upstream = torch.randn(rows, generator=generator)
    return Problem(
        hidden=hidden.to(device, of).requires_grad_(settings["mode"] != "logp"),
        weight=weight.to(device, of).requires_grad_(settings["mode"] == "full"),
        target=target.to(device),
        upstream=upstream.to(device),
        length=branch_length(rows),
        mode=settings["mode"],
    )


def call(way: Way, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(what the provider returned, its gradients)"""
    with nullcontext() if problem.leaves else torch.no_grad():
        result, loss = loss_of(way, problem)
        if way.objective == "products" or not problem.leaves:
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


def verify(way: Way, problem: Problem) -> dict[str, float]:
    """Relative errors, in the Euclidean norm, of the result ("error"), dX and dW ("error_dx", "error_dw")."""
    if way.objective == "products":
        return {}
    result, gradients = call(way, problem)
    true, true_gradients = oracle(way.objective, problem)
    names = ("error", "error_dx", "error_dw")
    pairs = zip_longest((result, *gradients), (true, *true_gradients))
    return {name: relative(x, y) for name, (x, y) in zip(names, pairs, strict=False)}


def relative(x: Tensor | None, y: Tensor | None) -> float:
    """In the Euclidean norm, to y; infinite where one is missing or the shapes differ."""
    if x is None or y is None or x.shape != y.shape:
        return math.inf
    return ((x.double() - y).norm() / y.norm()).item()
