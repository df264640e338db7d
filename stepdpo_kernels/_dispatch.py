"""The one place where an implementation of an operation is chosen.

Each implementation registers itself with a function `why_not(inputs) -> list[str]`: every reason why it cannot
take these inputs, none if it can. An implementation asked for by name raises with all its reasons and never falls
back. "auto" walks the implementations of an operation in order of preference and logs, once for each
choice, what it took.

Who asks, strongest first: the `impl=` argument, the innermost `use_impl()`, the variable STEPDPO_IMPL
("chunked" for all operations, or "linear_logprob=chunked,tree_attention=reference"), "auto".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch

logger = logging.getLogger("stepdpo_kernels")

_F = TypeVar("_F", bound=Callable[..., Any])

# Order of preference for "auto", over all operations.
PREFERENCE = (
    *("flash", "varlen", "triton", "triton_chunked", "triton_fused", "flex"),
    *("cpu", "chunked", "torch", "reference"),
)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `inputs` of `why_not` are the operation's own arguments."""

    op: str
    name: str
    run: Callable[..., Any]
    why_not: Callable[[dict[str, Any]], list[str]]
    why_not_auto: Callable[[dict[str, Any]], list[str]]
    self_test: Callable[[dict[str, Any]], list[str]]


class Kind(NamedTuple):
    """What a choice depends on of a tensor."""

    device: torch.device
    dtype: torch.dtype


# Where each operation registers its implementations; imported when a name is looked up.
_HOMES = {
    "linear_logprob": "stepdpo_kernels.ops.linear_logprob.api",
    "pair_loss": "stepdpo_kernels.ops.pair_loss.api",
    "segment_sum": "stepdpo_kernels.ops.ragged",
    "tree_attention": "stepdpo_kernels.ops.tree_attention.api",
}
_implementations: dict[str, dict[str, Implementation]] = {}
_chosen_in_context: ContextVar[dict[str, str]] = ContextVar("stepdpo_impl", default={})  # noqa: B039 (never mutated)


def no_reason(inputs: dict[str, Any]) -> list[str]:
    return []


def triton_why_not(argument: str, module: str) -> Callable[[dict[str, Any]], list[str]]:
    """`why_not` of the Triton kernels in `module`, which is imported only for an `argument` that they could take."""

    def why_not(inputs: dict[str, Any]) -> list[str]:
        device = inputs[argument].device
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return [f"it runs on GPUs, and {argument} is on {device}"]
        try:
            kernels = import_module(module)
        except ModuleNotFoundError as error:
            return [f"{error.name} is not installed"]
        reasons: list[str] = kernels.why_not(inputs)
        return reasons

    return why_not


def triton_why_not_auto(argument: str) -> Callable[[dict[str, Any]], list[str]]:
    """`why_not_auto` of Triton kernels."""
    return lambda inputs: ["Triton's interpreter is for tests"] if inputs[argument].device.type == "cpu" else []


def asked_once(choice: _F) -> _F:
    """For a function of constants that torch.compile is to call when it traces, and not to trace.

    What torch.compiler.assume_constant_result does; that one imports torch's compiler, which takes seconds.
    """
    choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return choice


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    why_not: Callable[[dict[str, Any]], list[str]],
    why_not_auto: Callable[[dict[str, Any]], list[str]] = no_reason,
    self_test: Callable[[dict[str, Any]], list[str]] = no_reason,
) -> None:
    """Adds an implementation of `op`.

    why_not_auto:  reasons that do not count when it is asked for by name
    self_test:     what is wrong with it on this device, asked last, once nothing else speaks against it
    """
    if name not in PREFERENCE:
        raise ValueError(f"implementation {name!r} of {op} is not one of {', '.join(PREFERENCE)}")
    _implementations.setdefault(op, {})[name] = Implementation(op, name, run, why_not, why_not_auto, self_test)


def implementations(op: str) -> list[str]:
    """Names of what is registered for `op`, the preferred first."""
    return [name for name in PREFERENCE if name in _implementations[op]]


@contextmanager
def use_impl(everywhere: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Within this context, use one implementation for every operation that has it, or one per operation by name.

        with use_impl("reference"): ...
        with use_impl(linear_logprob="chunked", tree_attention="reference"): ...

    Does not cross threads: gradient checkpointing that recomputes on the autograd thread of a GPU sees "auto".
    Use STEPDPO_IMPL for that. Raises ValueError for a name that nothing has.
    """
    wanted = dict(_chosen_in_context.get())
    if everywhere is not None:
        _check_known("*", everywhere)
        wanted = {"*": everywhere}
    for op, name in by_op.items():
        _check_known(op, name)
        wanted[op] = name
    token = _chosen_in_context.set(wanted)
    try:
        yield
    finally:
        _chosen_in_context.reset(token)


def _check_known(op: str, name: str) -> None:
    for home in _HOMES.values():
        import_module(home)
    if op != "*" and op not in _implementations:
        raise ValueError(f"no operation {op!r}; there are: {', '.join(sorted(_implementations))}")
    known = (
        implementations(op) if op != "*" else [n for n in PREFERENCE if any(n in i for i in _implementations.values())]
    )
    if name not in (*known, "auto"):
        where = f"operation {op!r}" if op != "*" else "any operation"
        raise ValueError(f"no implementation {name!r} of {where}; there are: auto, {', '.join(known)}")


@lru_cache(maxsize=8)
def _parse_environment(text: str) -> dict[str, str]:
    wanted = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, name = part.rpartition("=")
        op, name = (op or "*").strip(), name.strip()
        try:
            _check_known(op, name)
        except ValueError as error:
            raise ValueError(f"environment variable STEPDPO_IMPL={text!r}: {error}") from None
        wanted[op] = name
    return wanted


def _requested(op: str) -> str:
    for wanted in (_chosen_in_context.get(), _parse_environment(os.environ.get("STEPDPO_IMPL", ""))):
        if op in wanted:
            return wanted[op]
        # "everywhere" means every operation that has it
        if wanted.get("*") in ("auto", *_implementations[op]):
            return wanted["*"]
    return "auto"


def choose(op: str, impl: str, inputs: dict[str, Any]) -> Implementation:
    """The implementation of `op` to use for these inputs.

    Raises ValueError when the implementation asked for by name is unknown or cannot take the inputs, with all its
    reasons, and when under "auto" none can.
    """
    candidates = _implementations[op]
    name = impl if impl != "auto" else _requested(op)
    if name != "auto":
        _check_known(op, name)
        reasons = candidates[name].why_not(inputs) or candidates[name].self_test(inputs)
        if reasons:
            raise ValueError(f"implementation {name!r} of {op} cannot take these inputs: {'; '.join(reasons)}")
        return candidates[name]
    refusals: list[str] = []
    for name in implementations(op):
        one = candidates[name]
        reasons = one.why_not(inputs) or one.why_not_auto(inputs) or one.self_test(inputs)
        if not reasons:
            _log_choice(op, name, "; ".join(refusals))
            return candidates[name]
        refusals.append(f"not {name}: {', '.join(reasons)}")
    raise ValueError(f"no implementation of {op} can take these inputs: {'; '.join(refusals)}")


@lru_cache(maxsize=256)
def _log_choice(op: str, name: str, refusals: str) -> None:
    # The definition is for checking: slow, and for attention quadratic in memory.
    level = logging.WARNING if name == "reference" else logging.INFO
    logger.log(level, "%s: using %s%s", op, name, f" ({refusals})" if refusals else "")
