"""What a process does for a provider of the `attention` suite."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.registry import Case
from benchmarks.suites.attention import HEADS
from benchmarks.suites.attention.layouts import Forest
from benchmarks.suites.attention.providers import FLOORS, WORKS, Work, operations

# A wrong mask or formula is off by tens of percent, rounding in the dtype of the inputs by less than these.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
SMALL = {"lengths": "made", "prefix": 37, "branch": 9, "prefixes": 2, "pairs_per_prefix": 2}


def prepare(case: Case, folder: Path) -> None:
    """Nothing: each process makes its inputs from a seed."""


def tolerance(case: Case) -> float:
    return TOLERANCE[case["dtype"]]


def needs(provider: str, case: Case) -> int:
    """Masks and scores of all tokens by all tokens, forward and backward."""
    if provider != "dense-sdpa":
        return 0
    if case["lengths"] == "real":
        tokens = 160 * case["pairs"]
    else:
        tokens = case["prefixes"] * (case["prefix"] + (case["pairs_per_prefix"] + 1) * case["branch"])
    return tokens**2 * (1 + 3 * 4 * HEADS[case["heads"]][0])


def load(provider: str, case: Case, folder: Path) -> Attention:
    forest = Forest(case)
    work = FLOORS[provider](forest, case) if provider in FLOORS else WORKS[provider](forest)
    return Attention(work, forest, case)


class Attention:
    """Forward, and in mode "full" the gradients of queries, keys and values."""

    keeps_state = False
    note = ""

    def __init__(self, work: Work, forest: Forest, case: Case) -> None:
        self.work, self.nodes = work, forest.tokens
        self.backward = case["mode"] == "full" and bool(work.upstream)
        self.facts = {"unique_tokens": float(forest.tokens), "operations": float(operations(forest, case))}
        if not self.backward:
            work.inputs = [[x.detach() for x in group] for group in work.inputs]
        if work.upstream:
            places = work.index.numel()
            self.facts |= {"tokens": float(places), "of_unique": places / forest.tokens}

    def run(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        if not self.backward:
            with torch.no_grad():
                return self.work.forward(*self.work.inputs), ()
        outputs = self.work.forward(*self.work.inputs)
        leaves = [x for group in self.work.inputs for x in group]
        return outputs, torch.autograd.grad(outputs, leaves, self.work.upstream)

    def value(self, outputs: tuple[list[Tensor], tuple[Tensor, ...]]) -> None:
        return None


def errors(provider: str, case: Case) -> dict[str, float]:
    """Of the output, dQ, dK and dV, relative to float64 in the Euclidean norm, on a small forest."""
    if provider in FLOORS:
        return {}
    small = {**case, **SMALL}
    forest = Forest(small)
    work = WORKS[provider](forest)
    outputs, gradients = Attention(work, forest, small).run()
    true, *true_gradients = definition(forest)
    copies = torch.bincount(work.index[work.index >= 0], minlength=forest.tokens)[:, None, None].to(true.device)
    found = {"error": work.of_nodes([x.detach() for x in outputs], forest.tokens) / copies}
    if gradients:
        count = len(work.inputs[0])
        parts = [list(gradients[i : i + count]) for i in range(0, 3 * count, count)]
        found |= {f"error_d{n}": work.of_nodes(p, forest.tokens) for n, p in zip("qkv", parts, strict=True)}
    return {
        name: ((x - y).norm() / y.norm()).item()
        for (name, x), y in zip(found.items(), (true, *true_gradients), strict=False)
    }


def definition(forest: Forest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, dQ, dK, dV of all nodes by the definition, in float64: every query sees the nodes on the way to it."""
    plan = forest.plan
    query, key, value = (x.detach().double().requires_grad_() for x in (forest.query, forest.key, forest.value))
    output = torch.zeros_like(query)
    ends_q, ends_k, keys = plan.cu_q.tolist(), plan.cu_k.tolist(), plan.keys.index.to(query.device)
    group = query.shape[1] // key.shape[1]
    for leaf in range(plan.num_leaves):
        path = keys[ends_k[leaf] : ends_k[leaf + 1]]
        for place in range(ends_q[leaf], ends_q[leaf + 1]):
            seen = path[: len(path) - (ends_q[leaf + 1] - 1 - place)]
            k, v = (x[seen].repeat_interleave(group, dim=1) for x in (key, value))  # (seen, H, size)
            scores = forest.scale * (query[place] * k).sum(dim=2)
            output[place] = (scores.softmax(dim=0)[..., None] * v).sum(dim=0)
    d_query, d_key, d_value = torch.autograd.grad(output, (query, key, value), forest.upstream.double())
    return output.detach(), d_query, d_key, d_value
