"""I5, numerics: no further from a float64 oracle than twice the eager computation in the same dtype, plus rounding.

error(ours) <= 2 * (error(eager) + eps * max|oracle|), for the forward and for each gradient, and for every
implementation of every operation that runs on this machine. The bound is not for loosening.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.linear_logprob import linear_logprob
from stepdpo_kernels.ops.tree_attention import tree_attention
from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.packing import build_batch
from tests.forests import forest_pairs
from tests.numerics import assert_as_good_as_eager, eager_logprob, value_and_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _skip_what_cannot(op: str, impl: str, inputs: dict[str, Any]) -> None:
    if reasons := _dispatch._implementations[op][impl].why_not(inputs):
        pytest.skip("; ".join(reasons))


def _results(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """[output, gradient of each input] of ours, of eager, and of eager in float64."""
    return (
        value_and_gradients(ours, inputs, upstream),
        value_and_gradients(eager, inputs, upstream),
        value_and_gradients(eager, inputs, upstream, torch.float64),
    )


# rows, hidden size, vocabulary, scale of the hidden states, scale of the upstream gradient
SHAPES = {
    "odd": (129, 67, 1009, 1.0, 1.0),
    "even": (128, 64, 1024, 1.0, 1.0),
    "one row": (1, 96, 4099, 1.0, 1.0),
    "many rows": (1500, 8, 77, 1.0, 1.0),
    "long sums": (16, 2048, 257, 0.3, 1.0),
    "sharp": (64, 64, 1031, 20.0, 1.0),
    "extreme": (32, 64, 513, 300.0, 1.0),
    "flat": (64, 64, 1031, 1e-3, 1.0),
    "small gradient": (64, 64, 1031, 1.0, 1e-3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.2},
    "all": {"bias": True, "softcap": 30.0, "logit_scale": 1.7},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [(s, o) for s in SHAPES for o in OPTIONS if o == "plain" or s in ("odd", "sharp")],
)
@pytest.mark.parametrize("impl", _dispatch.implementations("linear_logprob"))
def test_head(impl: str, shape: str, options: str, dtype: torch.dtype) -> None:
    rows, size, vocabulary, scale, small = SHAPES[shape]
    rest = {k: v for k, v in OPTIONS[options].items() if k != "bias"}
    if "softcap" in rest and scale > 1:  # in proportion, or all logits but a few are flat, and those a matter of luck
        rest["softcap"] *= scale

    def results() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        hidden, weight = (scale * torch.randn(rows, size)).to(dtype), torch.randn(vocabulary, size).to(dtype)
        bias, target = torch.randn(vocabulary).to(dtype), torch.randint(vocabulary, (rows,))
        if shape in ("sharp", "extreme"):  # both certain tokens and impossible ones
            logits = hidden.double() @ weight.double().T
            target[::3], target[1::3] = logits.argmax(1)[::3], logits.argmin(1)[1::3]
        inputs = [hidden, weight] + ([bias] if "bias" in OPTIONS[options] else [])
        arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, **rest}
        _skip_what_cannot("linear_logprob", impl, arguments)

        def call(op: Callable[..., Tensor], **more: Any) -> Callable[..., Tensor]:
            return lambda h, w, b=None: op(h, w, target, bias=b, **rest, **more)

        return _results(call(linear_logprob, impl=impl), call(eager_logprob), inputs, small * torch.randn(rows))

    # the largest error of a single row is a matter of luck: of sixteen such problems it is not
    repeats = [results() for _ in range(16 if rows == 1 else 1)]
    for i, name in enumerate(["log-probs", "dX", "dW", "db"][: len(repeats[0][0])]):
        ours, eager, oracle = (torch.stack([r[which][i] for r in repeats]) for which in range(3))
        assert_as_good_as_eager(name, ours, eager, oracle, dtype)


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As transformers' eager attention: products in the dtype, softmax in float32."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, *(x.repeat_interleave(group, dim=1) for x in (key, value))))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(query.dtype, torch.float32)
    return (F.softmax(scores, dim=-1, dtype=wide).to(query.dtype) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("share", ["tree", "none"])
@pytest.mark.parametrize("impl", _dispatch.implementations("tree_attention"))
def test_attention(impl: str, share: str, spread: float, window: int | None, dtype: torch.dtype) -> None:
    plan = build_batch(forest_pairs(), range(13), share).plan
    query, key, value = (torch.randn(plan.num_tokens, h, 32) for h in (4, 2, 2))
    inputs = [(spread * query).to(dtype), key.to(dtype), value.to(dtype)]
    leaves = (x.detach().requires_grad_() for x in inputs)
    _skip_what_cannot(
        "tree_attention", impl, {**dict(zip(("query", "key", "value"), leaves, strict=True)), "plan": plan}
    )
    mask, scale = dense_mask(plan, window), 32**-0.5
    results = _results(
        lambda q, k, v: tree_attention(q, k, v, plan, scale=scale, sliding_window=window, impl=impl),
        lambda q, k, v: _eager_attention(q, k, v, mask, scale),
        inputs,
        torch.randn(plan.num_tokens, 4, 32),
    )
    for name, a, b, c in zip(["output", "dQ", "dK", "dV"], *results, strict=True):
        assert_as_good_as_eager(name, a, b, c, dtype)
