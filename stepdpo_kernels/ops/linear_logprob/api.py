"""`linear_logprob`: log-probs of target tokens straight from hidden states, without the logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.checks import check_below
from stepdpo_kernels.ops.linear_logprob import chunked, cpu_kernel, parallel, reference
from stepdpo_kernels.ops.linear_logprob.in_forward import (
    Ends,
    GroupedLogprob,
    Needs,
    Ready,
    RunGroups,
    in_groups,
    join_groups,
    logprob_by_groups,
    loss_gradients,
    slope_of,
)

_T = TypeVar("_T")


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    impl: str = "auto",
) -> Tensor:  # (R,) float32
    """Log-probability of each row's target token under softmax(hidden @ weight.T), for any upstream gradient.

    With z = logit_scale * (hidden @ weight.T + bias), and z <- softcap * tanh(z / softcap) where a softcap is given,
    returns log softmax(z)[r, target[r]]. Differentiable in hidden, weight and bias; a gradient that nobody
    asked for costs nothing.

    Args:
        hidden: (R, D) float32, bfloat16, float16 or float64. R = 0 is fine.
        weight: (V, D), the dtype of hidden. Under torch.autocast both are cast to its dtype first.
        target: (R,) int64 in [0, V).
        bias: (V,), optional.
        softcap: cap on the logits' magnitude (Gemma 2), positive.
        logit_scale: factor on the logits (Cohere; the inverse of Granite's divisor).
        group, vocab_start: for a vocabulary sharded over the processes of `group` (tensor parallel): weight and bias
            are this one's rows from vocab_start on; hidden and target are the same everywhere, and so is the
            result. A weight that is a DTensor sharded by rows says both itself; hidden is then a replicated DTensor.
        impl: "auto", or the name of an implementation, which then raises rather than falls back.

    Returns:
        (R,) float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a target outside the vocabulary (on CUDA a
            device-side assertion, to spare a synchronisation; under torch.compile a RuntimeError), or an `impl`
            that cannot take the inputs.
    """
    problem = _prepared(hidden, weight, target, bias, softcap, logit_scale, impl, group, vocab_start)
    with torch.autocast(hidden.device.type, enabled=False):
        return problem.logprob(None)


def linear_loss(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,) int64
    ends: Ends,
    loss_of: Callable[[Tensor], tuple[Tensor, _T]],
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, _T]:
    """`loss_of(linear_logprob(...))` for a loss that falls apart into groups of rows.

    Where there are many more rows than the implementation keeps what backward needs of, the gradients are taken in
    forward, group by group (in_forward.py): three products for any R. Otherwise as autograd has it.

    Args:
        hidden, weight, target, bias, softcap, logit_scale, impl: as for `linear_logprob`.
        ends: rising numbers of rows after which a group ends, the last of them R, or a function that gives them: the
            gradient of the loss in the log-probs of a group's rows must depend on these alone. Empty: all rows are one.
        loss_of: log-probs (R,) -> (scalar loss, anything else, without a gradient). It may be called several times,
            also with log-probs of 0 in all groups but one.

    Returns:
        (loss, anything else) of all log-probs; the loss is differentiable in hidden, weight and bias.

    Raises:
        ValueError: as `linear_logprob`.
    """
    problem = _prepared(hidden, weight, target, bias, softcap, logit_scale, impl)
    edges = _edges(problem, ends)
    with torch.autocast(hidden.device.type, enabled=False):
        if edges is None or not problem.trained:
            return loss_of(problem.logprob(edges))
        slope, run = slope_of(lambda logp: loss_of(logp)[0]), problem.by_groups(edges)
        with torch.no_grad():
            logp, gradients = run(*problem.inputs, slope, problem.needs)
            loss, other = loss_of(logp)
        return Ready.apply(*problem.inputs, loss, gradients, run, slope), other


def grouped_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ends: Ends,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (R,)
    """`linear_logprob` by the very products that `linear_loss` takes for these rows and ends: for its reference."""
    problem = _prepared(hidden, weight, target, bias, softcap, logit_scale, impl)
    with torch.autocast(hidden.device.type, enabled=False):
        return problem.logprob(_edges(problem, ends))


class _Problem(NamedTuple):
    """What an implementation takes, and which one."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    options: dict[str, float | None]
    name: str
    sharded: bool
    run: Callable[..., Tensor]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def needs(self) -> Needs:
        trains_bias = self.bias is not None and self.bias.requires_grad
        return Needs(self.hidden.requires_grad, self.weight.requires_grad, trains_bias)

    @property
    def trained(self) -> bool:
        """Whether a gradient of weight or bias is wanted, for which Q has to be kept."""
        return torch.is_grad_enabled() and (self.needs.weight or self.needs.bias)

    def logprob(self, edges: list[int] | None) -> Tensor:  # (R,)
        """Of all rows at once, or of the groups between edges one after the other."""
        if edges is None:
            return self.run(self.hidden, self.weight, self.target, bias=self.bias, **self.options)
        plain = partial(logprob_by_groups, self.run, self.target, self.options, edges)
        if not self.trained:
            return plain(*self.inputs)
        return GroupedLogprob.apply(*self.inputs, plain, self.by_groups(edges))

    def by_groups(self, edges: list[int]) -> RunGroups:
        """Holds none of the inputs: autograd has them."""
        return partial(loss_gradients, _IN_FORWARD[self.name]().Groups, self.target, self.options, edges)


def _prepared(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    impl: str,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> _Problem:
    """Checked, in the dtype of autocast, with the implementation chosen."""
    if parallel.is_distributed(weight):
        hidden, weight, bias, group, vocab_start = parallel.localize(hidden, weight, bias)
    if (group is None) != (vocab_start is None):
        raise ValueError("group and vocab_start go together: the processes, and where this one's rows begin")
    sharded = group is not None
    _check(hidden, weight, target, bias, softcap, logit_scale, sharded=sharded)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one, or use torch.autocast")
    name = _choose(impl, hidden.device, hidden.dtype, None if bias is None else bias.dtype, sharded)
    run = _RUN[name]
    if not hidden.shape[0]:
        run = _no_rows
    elif group is not None and vocab_start is not None:
        run = partial(parallel.linear_logprob, name, group=group, first=vocab_start)
    options = {"softcap": softcap, "logit_scale": logit_scale}
    return _Problem(hidden, weight, bias, target, options, name, sharded, run)


def _no_rows(hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, **_: float | None) -> Tensor:
    """Nothing to compute, but the (zero) gradient still flows."""
    nothing = hidden.sum() + weight[:0].sum() + (0 if bias is None else bias[:0].sum())
    return nothing.to(torch.promote_types(hidden.dtype, torch.float32)).expand(0)


def _edges(problem: _Problem, ends: Ends) -> list[int] | None:
    """Where the groups lie that are computed one after the other; None for all rows at once.

    A matter of sizes and of the implementation alone, not of what needs a gradient: policy and reference go through
    the same products, unless one of them is compiled, where there are no groups.
    """
    if problem.sharded or problem.name not in _IN_FORWARD or torch.compiler.is_compiling():
        return None
    if problem.weight.dtype == torch.float16:  # gradients without the scale of the loss have no room in it
        return None
    rows, weight, home = problem.hidden.shape[0], problem.weight, _IN_FORWARD[problem.name]()
    limit = home.group_rows(weight)
    if not in_groups(rows, home.kept_rows(rows, weight)) or home.kept_rows(limit, weight) < limit:
        return None
    if limit * weight.numel() < home.LEAST_WORK:
        return None
    edges = join_groups(ends() if callable(ends) else ends, rows, limit)
    return edges if len(edges) > 2 else None


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    sharded: bool,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (R, D) and weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise ValueError(f"target must be ({rows},) int64, got {tuple(target.shape)} {target.dtype}")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias must be ({vocabulary},), got {tuple(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
    if len({t.device for t in (hidden, weight, target, bias) if t is not None}) != 1:
        raise ValueError(
            "hidden, weight, target and bias must be on one device, "
            f"got {hidden.device}, {weight.device}, {target.device}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if logit_scale is not None and not abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if not sharded:  # there, who has which tokens is seen when the processes meet
        check_below(target, vocabulary, "target", "the vocabulary")


@_dispatch.asked_once
def _choose(impl: str, device: torch.device, dtype: torch.dtype, bias_dtype: torch.dtype | None, sharded: bool) -> str:
    """The implementation's name."""
    inputs = {
        "hidden": _dispatch.Kind(device, dtype),
        "bias": None if bias_dtype is None else _dispatch.Kind(device, bias_dtype),
        "sharded": sharded,
    }
    return _dispatch.choose("linear_logprob", impl, inputs).name


def _triton_chunked_module() -> Any:
    from stepdpo_kernels.ops.linear_logprob import triton_chunked

    return triton_chunked


def _triton_chunked(*args: Any, **options: Any) -> Tensor:
    return _triton_chunked_module().linear_logprob(*args, **options)


def _triton_fused(*args: Any, **options: Any) -> Tensor:
    from stepdpo_kernels.ops.linear_logprob import triton_kernel

    return triton_kernel.linear_logprob(*args, **options)


_triton_why_not = _dispatch.triton_why_not("hidden", "stepdpo_kernels.ops.linear_logprob.triton_kernel")
_triton_why_not_auto = _dispatch.triton_why_not_auto("hidden")


def _triton_chunked_why_not_auto(inputs: dict[str, Any]) -> list[str]:
    narrow = inputs["hidden"].dtype.itemsize == 2
    slow = ["without float32 outputs of 16-bit products it casts all of weight"] if torch.version.hip and narrow else []
    return _triton_why_not_auto(inputs) + slow


def _whole(why_not: Callable[[dict[str, Any]], list[str]]) -> Callable[[dict[str, Any]], list[str]]:
    """`why_not` of an implementation that takes no part of a vocabulary."""

    def with_shards(inputs: dict[str, Any]) -> list[str]:
        return why_not(inputs) + (["it takes no sharded vocabulary"] if inputs.get("sharded") else [])

    return with_shards


_RUN: dict[str, Callable[..., Tensor]] = {
    "triton_chunked": _triton_chunked,
    "triton_fused": _triton_fused,
    "cpu": cpu_kernel.linear_logprob,
    "chunked": chunked.linear_logprob,
    "reference": reference.linear_logprob,
}
# Implementations that take a loss's gradients in forward: their modules.
_IN_FORWARD: dict[str, Callable[[], Any]] = {"triton_chunked": _triton_chunked_module, "cpu": lambda: cpu_kernel}
for _name, _why_not, _why_not_auto in (
    ("triton_chunked", _whole(_triton_why_not), _triton_chunked_why_not_auto),
    ("triton_fused", _triton_why_not, _triton_why_not_auto),
    ("cpu", _whole(cpu_kernel.why_not), _dispatch.no_reason),
    ("chunked", _dispatch.no_reason, _dispatch.no_reason),
    ("reference", _whole(_dispatch.no_reason), _dispatch.no_reason),
):
    _dispatch.register("linear_logprob", _name, _RUN[_name], _why_not, _why_not_auto)
