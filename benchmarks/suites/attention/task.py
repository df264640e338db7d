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
SAMPLE = 16  # nodes of the forest that is measured of which float64 is known
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

    note = ""

    def __init__(self, work: Work, forest: Forest, case: Case) -> None:
        self.work, self.forest = work, forest
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

    def errors(self, outputs: tuple[list[Tensor], tuple[Tensor, ...]]) -> dict[str, float]:
        """Of the output and dQ of a sample of nodes."""
        if not self.work.upstream:
            return {}
        nodes = torch.linspace(0, self.forest.tokens - 1, min(SAMPLE, self.forest.tokens)).long()
        true = definition_at(self.forest, nodes)
        got, gradients = outputs
        found = {"error_sample": relative(self.output_of(got, nodes), true[0])}
        if gradients:
            of_queries = list(gradients[: len(self.work.inputs[0])])
            found["error_dq_sample"] = relative(self.work.of_nodes(of_queries, nodes), true[1])
        return found

    def output_of(self, outputs: list[Tensor], nodes: Tensor) -> Tensor:
        """(len(nodes), H, size): the mean over the places of each node"""
        index = self.work.index[self.work.index >= 0]
        copies = torch.bincount(index, minlength=self.forest.tokens)[nodes][:, None, None]
        return self.work.of_nodes([x.detach() for x in outputs], nodes) / copies.to(outputs[0].device)


def errors(provider: str, case: Case) -> dict[str, float]:
    """Of the output, dQ, dK and dV, relative to float64 in the Euclidean norm, on a small forest."""
    if provider in FLOORS:
        return {}
    small = {**case, **SMALL}
    forest = Forest(small)
    work = WORKS[provider](forest)
    task, nodes = Attention(work, forest, small), torch.arange(forest.tokens)
    outputs, gradients = task.run()
    found = {"error": task.output_of(outputs, nodes)}
    if gradients:
        count = len(work.inputs[0])
        parts = [list(gradients[i : i + count]) for i in range(0, 3 * count, count)]
        found |= {f"error_d{n}": work.of_nodes(p, nodes) for n, p in zip("qkv", parts, strict=True)}
    return {name: relative(x, y) for (name, x), y in zip(found.items(), definition(forest), strict=False)}


def relative(x: Tensor, y: Tensor) -> float:
    """In the Euclidean norm, to y."""
    return ((x - y).norm() / y.norm()).item()


def definition(forest: Forest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, dQ, dK, dV of all nodes by the definition, in float64: every query sees the nodes on the way to it."""
    leaves = [x.detach().double().requires_grad_() for x in (forest.query, forest.key, forest.value)]
    output = torch.stack([attended(forest, node, leaves[0][node], *leaves[1:]) for node in range(forest.tokens)])
    d_query, d_key, d_value = torch.autograd.grad(output, leaves, forest.upstream.double())
    return output.detach(), d_query, d_key, d_value


def definition_at(forest: Forest, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Output and dQ, (len(nodes), H, size), of these nodes alone."""
    key, value = forest.key.detach().double(), forest.value.detach().double()
    found = []
    for node in nodes.tolist():
        query = forest.query[node].detach().double().requires_grad_()
        output = attended(forest, node, query, key, value)
        found.append((output.detach(), *torch.autograd.grad(output, query, forest.upstream[node].double())))
    outputs, gradients = zip(*found, strict=True)
    return torch.stack(outputs), torch.stack(gradients)


def attended(forest: Forest, node: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(H, size) of one node's query (H, size) over keys and values (T, KV heads, size)"""
    plan = forest.plan
    leaf = int(torch.searchsorted(plan.cu_q, node, right=True)) - 1
    after = int(plan.cu_q[leaf + 1]) - 1 - node
    seen = plan.keys.index[int(plan.cu_k[leaf]) : int(plan.cu_k[leaf + 1]) - after].to(key.device)
    grouped = query.unflatten(0, (key.shape[1], -1))  # (KV heads, heads of each, size)
    weights = (forest.scale * torch.einsum("kgd,nkd->kgn", grouped, key[seen])).softmax(dim=2)
    return torch.einsum("kgn,nkd->kgd", weights, value[seen]).flatten(0, 1)
