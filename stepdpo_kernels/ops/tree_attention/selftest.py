"""A tiny forest that every CUDA backend computes once before its first use, held against the definition.

Kernels for sequences of different lengths align their causal mask with the first key or with the last, and some leave
out silently what they do not have. A backend that differs, in the output or in a gradient, is refused like one that
cannot take the inputs, with what is wrong as the reason. Once for each backend, device, dtype, size of heads
and option, a few milliseconds beside the kernels' compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from stepdpo_kernels._dispatch import asked_once
from stepdpo_kernels.ops.tree_attention import reference
from stepdpo_kernels.types import Ragged, TreePlan

# Largest error in proportion to the largest value; float32 may be multiplied as TF32. What the faults looked for do is
# several times as much: tests/ops/test_attention_backends.py.
TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-8, torch.float64: 2**-8}
UNTESTED = ("cpu",)  # devices whose implementations the test suite has run

# Leaves in depth-first order: how many tokens of the path before each shares, and how many it owns.
LEAVES = ((0, 10), (7, 3), (3, 8), (0, 3), (2, 1), (1, 5))
GROUPS, SHARE = 2, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "sliding_window": {"sliding_window": 4},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": (2.5, -1.0, 1.5, 0.5)},
}

_backends: dict[str, Callable[..., Tensor]] = {}


def tiny_plan() -> TreePlan:
    paths: list[list[int]] = []
    tokens = 0
    for shared, own in LEAVES:
        paths.append([*(paths[-1][:shared] if paths else []), *range(tokens, tokens + own)])
        tokens += own
    index = np.concatenate(paths)
    queries, keys = [own for _, own in LEAVES], [len(path) for path in paths]
    return TreePlan(
        keys=Ragged.from_rows(index, np.ones_like(index), tokens),
        cu_q=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        cu_k=torch.tensor([0, *np.cumsum(keys)], dtype=torch.int32),
        max_q=max(queries),
        max_k=max(keys),
    )


def _inputs(tokens: int, sizes: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the output's gradient, for heads of sizes d and e."""
    generator = torch.Generator().manual_seed(0)
    heads, (d, e) = GROUPS * SHARE, sizes
    shapes = ((heads, d), (GROUPS, d), (GROUPS, e), (heads, e))
    return [torch.randn(tokens, *shape, generator=generator).to(device, dtype) for shape in shapes]


def _results(run: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, **options: Any) -> dict[str, Tensor]:
    query, key, value, *sinks = inputs
    if sinks:
        options["sinks"] = sinks[0]
    output = run(query, key, value, scale=query.shape[2] ** -0.5, **options)
    gradients = torch.autograd.grad(output, inputs, upstream.to(output.dtype))
    names = ("output", "dQ", "dK", "dV", "gradient of the sinks")
    return {name: x.detach().double() for name, x in zip(names, (output, *gradients), strict=False)}


def _error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    errors = {name: ((ours[name] - x).abs().max() / x.abs().max()).item() for name, x in exact.items()}
    return max((error if error == error else float("inf"), name) for name, error in errors.items())


def _compare(name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], feature: str) -> str | None:
    plan = tiny_plan().to(device)
    *inputs, upstream = _inputs(plan.num_tokens, sizes, device, dtype)
    options = dict(OPTIONS[feature])
    if feature == "sinks":
        inputs.append(torch.tensor(options.pop("sinks"), device=device, dtype=dtype))
    narrow, wide = ([x.to(of).requires_grad_() for x in inputs] for of in (dtype, torch.float64))
    exact = _results(reference.tree_attention, wide, upstream, plan=plan, **options)
    allowed = TOLERANCE[dtype]
    where = f"it fails its self-test on {device} in {dtype}" + (f" with {feature}" if feature else "")
    try:
        ours = _results(_backends[name], narrow, upstream, plan=plan, **options)
    except torch.OutOfMemoryError:  # another time there may be room
        raise
    except Exception as raised:  # whatever a kernel raises that does not fit this device
        return f"{where}: {type(raised).__name__}: {raised}"
    error, worst = _error(ours, exact)
    if error <= allowed:
        return None
    cause = ""
    output = ours["output"]
    # aligned with the first key, a leaf's first query sees the root and nothing else
    first, root = LEAVES[0][1], wide[2][0].repeat_interleave(SHARE, dim=0)
    if not feature and (output[first] - root).abs().max() <= allowed * root.abs().max():
        cause = "; its causal mask is aligned with the first key (top-left), not with the last (bottom-right)"
    elif feature:
        query, key, value, *_ = wide
        without = reference.tree_attention(query, key, value, plan, scale=sizes[0] ** -0.5)
        if (output - without).abs().max() <= allowed * without.abs().max():
            cause = "; it ignores it"
    return f"{where}: its {worst} is off by {error:.1%} of the largest value, {allowed:.1%} are allowed{cause}"


@lru_cache(maxsize=256)
def _fault(name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], feature: str) -> str | None:
    # first used wherever a model is: without gradients, under autocast or checkpointing, whose hooks this must not meet
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        return _compare(name, device, dtype, sizes, feature)


@asked_once
def fault(name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], feature: str) -> str | None:
    """What is wrong with a backend for heads of sizes d and e, with one of OPTIONS; None if nothing. Computed once."""
    return _fault(name, device, dtype, sizes, feature)


def of(name: str, run: Callable[..., Tensor]) -> Callable[[dict[str, Any]], list[str]]:
    """The faults of a backend that matter to given inputs: `self_test` for dispatch."""
    _backends[name] = run
    _fault.cache_clear()

    def faults(inputs: dict[str, Any]) -> list[str]:
        query, value = inputs["query"], inputs["value"]
        if query.device.type in UNTESTED:
            return []
        features = [feature for feature in OPTIONS if not feature or inputs.get(feature) is not None]
        sizes = (query.shape[2], value.shape[2])
        found = (fault(name, query.device, query.dtype, sizes, feature) for feature in features)
        return [reason for reason in found if reason is not None]

    return faults
