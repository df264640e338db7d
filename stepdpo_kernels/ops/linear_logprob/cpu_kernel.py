"""The C++ CPU operator: float32 and bfloat16, logits only as tiles in cache. Its maths is in csrc/linear_logprob.cpp.

Forward computes dX up to the upstream gradient while W is at hand, and keeps E = exp(z - z_target) in the input dtype
in the memory that becomes dW: a row of dW has room for E of D loss rows. `extra_rows` says how many more are kept
beside it; what is not kept, backward recomputes. So a full backward costs three products in all where everything is
kept, a frozen head two, log-probs alone one.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels.ops.checks import refuse_second_derivative
from stepdpo_kernels.ops.linear_logprob.in_forward import Needs

logger = logging.getLogger("stepdpo_kernels")

ROW_BLOCK = 128  # kRows in csrc/linear_logprob.cpp
LANES = 16  # rows are padded to a multiple of this
DTYPES = (torch.float32, torch.bfloat16)
# Multiplications of a group's product: with fewer, computing logits again is cheaper than asking the loss for a slope,
# which takes a millisecond or two.
LEAST_WORK = 1 << 28


def extra_rows(rows: int, hidden_size: int, vocabulary: int, element_bytes: int, limit_bytes: int | None = None) -> int:
    """Of how many loss rows forward keeps E beside the memory of dW, for a backward that needs dW.

    All that do not fit into dW, or as many as fit into a bfloat16 [min(R, 2D), V], the size of a float32 dW at
    R > 2D; or into `limit_bytes` if that is less.
    """
    padded, in_weight = _padded(rows), _in_weight(rows, hidden_size)
    budget = 2 * min(rows, 2 * hidden_size) * vocabulary
    if limit_bytes is not None:
        budget = min(budget, limit_bytes)
    affordable = budget // (vocabulary * element_bytes)
    return padded - in_weight if affordable >= padded - in_weight else affordable // ROW_BLOCK * ROW_BLOCK


def _padded(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _in_weight(rows: int, hidden_size: int) -> int:
    """Rows whose E fits into the memory of dW."""
    return _padded(rows) if _padded(rows) <= hidden_size else hidden_size // ROW_BLOCK * ROW_BLOCK


def _load() -> str | None:
    """Registers the operators; why not, if it cannot."""
    try:
        extension = import_module("stepdpo_kernels._C")
    except ModuleNotFoundError:
        return "the C++ extension is not built"
    except ImportError as error:
        return f"the C++ extension does not load, build it again with torch {torch.__version__} ({error})"
    built_with = getattr(extension, "torch_version", "unknown")  # unknown: of an older checkout
    if built_with.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"the C++ extension was built with torch {built_with}, build it again with {torch.__version__}"
    _register()
    return None


def _register() -> None:
    ops = torch.ops.stepdpo_kernels

    @torch.library.register_fake("stepdpo_kernels::linear_logprob_forward")
    def _(hidden, weight, target, bias, softcap, logit_scale, need_hidden, need_weight, extra_rows, overwrite):  # type: ignore[no-untyped-def]
        rows, size = hidden.shape
        return (
            hidden.new_empty(rows, dtype=torch.float32),
            hidden.new_empty(3, rows, dtype=torch.float32),
            hidden.new_empty(rows if need_hidden else 0, size, dtype=torch.float32),
            weight.new_empty(weight.shape[0] if need_weight else 0, size),
            weight.new_empty(weight.shape[0] * extra_rows),
        )

    @torch.library.register_fake("stepdpo_kernels::linear_logprob_forward_")
    def _(hidden, weight, target, bias, softcap, logit_scale, need_hidden, kept, extra):  # type: ignore[no-untyped-def]
        rows, size = hidden.shape
        return (
            hidden.new_empty(rows, dtype=torch.float32),
            hidden.new_empty(3, rows, dtype=torch.float32),
            hidden.new_empty(rows if need_hidden else 0, size, dtype=torch.float32),
        )

    @torch.library.register_fake("stepdpo_kernels::linear_logprob_backward")
    def _(grad, row, kept, extra, hidden, weight, target, bias, softcap, scale, need_weight, need_bias):  # type: ignore[no-untyped-def]
        vocabulary, size = weight.shape
        d_bias = weight.new_empty(vocabulary if need_bias else 0, dtype=torch.float32)
        return weight.new_empty(vocabulary if need_weight else 0, size), d_bias

    @torch.library.register_fake("stepdpo_kernels::linear_logprob_backward_")
    def _(grad, row, kept, extra, hidden, weight, target, bias, softcap, scale, sums, need_bias):  # type: ignore[no-untyped-def]
        return weight.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32)

    @torch.library.register_fake("stepdpo_kernels::linear_logprob_backward_to_sums_")
    def _(grad, row, kept, extra, hidden, weight, target, bias, softcap, scale, sums, add, need_bias):  # type: ignore[no-untyped-def]
        return weight.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, target, bias, ctx.softcap, ctx.logit_scale, *_, ctx.overwrite = inputs
        _, row, d_hidden, kept, extra = output
        ctx.mark_non_differentiable(row, d_hidden, kept, extra)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, target, bias, row, d_hidden, extra)
        ctx.kept = kept  # not a saved tensor: the first backward may turn it into dW

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_logprob's cpu implementation")
        hidden, weight, target, bias, row, d_hidden, extra = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        if grad is None:
            return (None,) * 10
        dx = (grad[:, None] * d_hidden).to(hidden.dtype) if need_hidden else None
        dw = db = None
        if need_weight or need_bias:
            problem = (hidden, weight, target, bias, ctx.softcap, ctx.logit_scale)
            kept = ctx.kept
            if need_weight and ctx.overwrite and kept is not None:
                ctx.kept = None
                db = ops.linear_logprob_backward_(grad, row, kept, extra, *problem, None, need_bias)
                dw = kept
            else:  # without `kept`, overwritten by an earlier backward through a retained graph, E is recomputed
                kept = weight.new_empty(0, weight.shape[1]) if kept is None else kept
                dw, db = ops.linear_logprob_backward(grad, row, kept, extra, *problem, need_weight, need_bias)
        return (
            dx,
            dw if need_weight else None,
            None,
            db.to(bias.dtype) if need_bias else None,  # type: ignore[union-attr]
            *(None,) * 6,
        )

    torch.library.register_autograd("stepdpo_kernels::linear_logprob_forward", backward, setup_context=setup_context)


_missing = _load()


@cache
def _log_missing() -> None:
    logger.warning("linear_logprob on CPUs runs in plain torch: %s", _missing)


def why_not(inputs: dict[str, Any]) -> list[str]:
    hidden, bias = inputs["hidden"], inputs["bias"]
    if hidden.device.type != "cpu":
        return [f"it runs on CPUs, and hidden is on {hidden.device}"]
    reasons = []
    if _missing:
        _log_missing()
        reasons.append(_missing)
    if hidden.dtype not in DTYPES:
        reasons.append(f"it takes float32 and bfloat16, and hidden is {hidden.dtype}")
    if bias is not None and bias.dtype not in DTYPES:
        reasons.append(f"it takes a float32 or bfloat16 bias, and bias is {bias.dtype}")
    return reasons


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
    extra_bytes: int | None = None,
) -> Tensor:  # (R,)
    """As `api.linear_logprob`; extra_bytes lowers what forward keeps beside dW for backward, 0 for the least memory."""
    grads = torch.is_grad_enabled()
    need_hidden, need_weight = grads and hidden.requires_grad, grads and weight.requires_grad
    rows, size = hidden.shape
    extra = extra_rows(rows, size, weight.shape[0], hidden.element_size(), extra_bytes) if need_weight else 0
    overwrite = not torch.compiler.is_compiling()  # compiled graphs have no writing over the output of another operator
    logp, *_ = torch.ops.stepdpo_kernels.linear_logprob_forward(
        hidden, weight, target, bias, softcap, logit_scale, need_hidden, need_weight, extra, overwrite
    )
    return logp


# ---- gradients in forward -------------------------------------------------------------------------------------------


def kept_rows(rows: int, weight: Tensor) -> int:
    """Of how many rows a full backward has E as it was kept."""
    vocabulary, size = weight.shape
    return min(rows, _in_weight(rows, size) + extra_rows(rows, size, vocabulary, weight.element_size()))


def group_rows(weight: Tensor) -> int:
    """Rows of a group: E of as many as fit into the memory of dW is kept, beside which there is a float32 dW."""
    return max(weight.shape[1] // ROW_BLOCK, 1) * ROW_BLOCK


class Groups:
    """As `in_forward.Groups`. E of each lies where the last one's dW will be, rounded from its float32 sums."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float | None, needs: Needs
    ) -> None:
        vocabulary, size = weight.shape
        self._weight, self._needs, self._rest = weight, needs, (bias, softcap, logit_scale)
        self._kept = torch.empty(vocabulary if needs.weight else 0, size, dtype=weight.dtype)
        self._sums = torch.empty(vocabulary, size) if needs.weight else None
        self._d_bias = torch.zeros(vocabulary) if needs.bias else None

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        vocabulary, size = self._weight.shape
        self._problem = (hidden, self._weight, target, *self._rest)
        rows = extra_rows(hidden.shape[0], size, vocabulary, hidden.element_size())
        self._extra = self._weight.new_empty(vocabulary * rows)
        logp, self._row, self._d_hidden = torch.ops.stepdpo_kernels.linear_logprob_forward_(
            *self._problem, self._needs.hidden, self._kept, self._extra
        )
        return logp

    def backward(self, grad: Tensor, *, first: bool, last: bool) -> Tensor | None:
        ops, need_bias = torch.ops.stepdpo_kernels, self._needs.bias
        given = (grad, self._row, self._kept, self._extra, *self._problem)
        if self._sums is None:
            _, db = ops.linear_logprob_backward(*given, False, need_bias)
        elif last:
            db = ops.linear_logprob_backward_(*given, None if first else self._sums, need_bias)
        else:
            db = ops.linear_logprob_backward_to_sums_(*given, self._sums, not first, need_bias)
        if self._d_bias is not None:
            self._d_bias += db
        return grad[:, None] * self._d_hidden if self._needs.hidden else None

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        return self._kept if self._needs.weight else None, self._d_bias
