"""Tree attention on CUDA by the packages of FlashAttention: flash_attn_interface (3, Hopper) or flash_attn (2).

The parts of their `flash_attn_varlen_func` are called, forward and deterministic backward; see `leaf_paths`. Of the two
the first that is installed and takes the inputs. Imported only when asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdpo_kernels.ops.tree_attention import leaf_paths
from stepdpo_kernels.ops.tree_attention.leaf_paths import Call, Kernel
from stepdpo_kernels.types import TreePlan


def _shared(call: Call) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.plan.cu_q,
        "cu_seqlens_k": call.plan.cu_k,
        "max_seqlen_q": call.plan.max_q,
        "max_seqlen_k": call.plan.max_k,
        "softmax_scale": call.scale,
        "window_size_left": call.window[0],
        "window_size_right": call.window[1],
        "softcap": call.softcap or 0.0,
    }


def _arguments_2(call: Call, backward: bool) -> dict[str, Any]:
    causal = {"dropout_p": 0.0, "causal": True, "alibi_slopes": None}
    return {**_shared(call), **causal, **({"deterministic": True} if backward else {})}


def _arguments_3(call: Call, backward: bool) -> dict[str, Any]:
    return {**_shared(call), **({"is_causal": True, "deterministic": True} if backward else {"causal": True})}


class Library(NamedTuple):
    """A package: `forward(q=, k=, v=, ...) -> out, lse, ...` and `backward(dout=, ..., dq=, dk=, dv=, ...)`.

    keeps_random:  whether the last of what forward returns is the state of the random numbers, for backward
    """

    module: str
    forward: str
    backward: str
    arguments: Callable[[Call, bool], dict[str, Any]]
    keeps_random: bool


FLASH_3 = Library("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward", _arguments_3, False)
FLASH_2 = Library(
    "flash_attn.flash_attn_interface",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
    _arguments_2,
    True,
)


def _mismatch(function: Callable[..., Any], names: Sequence[str]) -> str | None:
    """Why `function` cannot be called with arguments of these names."""
    try:
        inspect.signature(getattr(function, "_init_fn", function)).bind(**dict.fromkeys(names))  # under a custom_op
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@lru_cache(maxsize=4)
def _load(library: Library) -> ModuleType | str:
    """The module, or why it cannot be used."""
    try:
        module = import_module(library.module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a build for another torch fails in many ways
        return f"{library.module} cannot be imported: {type(error).__name__}: {error}"
    call = Call(TreePlan(None, None, None, 0, 0), 1.0, None, None)  # type: ignore[arg-type]  # only the names count
    tensors = {library.forward: "q k v", library.backward: "dout q k v out softmax_lse dq dk dv"}
    for name, of in tensors.items():
        function = getattr(module, name, None)
        if function is None:
            return f"{library.module} of this version has no {name}"
        mismatch = _mismatch(function, [*of.split(), *library.arguments(call, name == library.backward)])
        if mismatch:
            return f"{name} of this version of {library.module} takes other arguments: {mismatch}"
    return module


def _why_not(library: Library, inputs: dict[str, Any]) -> list[str]:
    module = _load(library)
    if isinstance(module, str):
        return [module]
    if library is FLASH_3:
        if torch.version.hip is not None or torch.cuda.get_device_capability(inputs["query"].device)[0] != 9:
            return ["flash_attn_interface is for Hopper"]
        size = max(inputs["query"].shape[2], inputs["value"].shape[2])
        if size > 192:
            return [f"flash_attn_interface has no deterministic backward for heads of {size}"]
    return []


def _kernel(library: Library) -> Kernel:
    module = _load(library)
    forward_of, backward_of = getattr(module, library.forward), getattr(module, library.backward)

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        out, lse, *rest = forward_of(q=q, k=k, v=v, **library.arguments(call, False))
        return out, lse, rest[-1:] if library.keeps_random else ()

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, random: Sequence[Tensor], call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        options = library.arguments(call, True) | ({"rng_state": random[0]} if random else {})
        backward_of(dout=grad, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=d_q, dk=d_k, dv=d_v, **options)
        return d_q, d_k, d_v

    return Kernel(forward, backward)


def why_not(inputs: dict[str, Any]) -> list[str]:
    reasons = leaf_paths.why_not(inputs)
    if reasons:
        return reasons
    of_each = [_why_not(library, inputs) for library in (FLASH_3, FLASH_2)]
    return [] if [] in of_each else [reason for found in of_each for reason in found]


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    library = FLASH_2 if _why_not(FLASH_3, {"query": query, "value": value}) else FLASH_3
    call = Call(plan, scale, sliding_window, softcap)
    return leaf_paths.attend(query, key, value, sinks, call, _kernel(library))
