"""How an error is judged, and the head's formula written once more for oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_good_as_eager(name: str, ours: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """error(ours) <= 2 * (error(eager) + eps * max|oracle|), largest absolute errors against a float64 oracle.

    eager is the plain computation in `dtype`, whose eps is meant.
    """
    assert oracle.dtype == torch.float64
    assert ours.shape == oracle.shape
    assert ours.isfinite().all(), f"{name} is not finite"
    error, eager_error = ((x.double() - oracle).abs().max().item() for x in (ours, eager))
    bound = 2 * (eager_error + torch.finfo(dtype).eps * oracle.abs().max().item())
    assert error <= bound, f"{name}: error {error:.3e}, of eager {eager_error:.3e}, allowed {bound:.3e}"


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    """|ours - oracle| / |oracle| in the Euclidean norm."""
    return ((ours.double() - oracle.double()).norm() / oracle.double().norm()).item()


def eager_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """What people write: logits in the dtype of the inputs, softmax in at least float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """[output, gradient of each input] of function(*inputs); the inputs are first cast to `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]
