"""How each provider of the `head` suite computes: ours, the peers, and the floor of plain matrix products.

Every provider gets the same `Problem` and returns either the log-probs of its rows, which the suite weights by a
gradient that differs from row to row, or, where that is all it offers, a scalar of its own:

    rows       (R,) log-probs; the loss is sum_r upstream[r] * logp[r]
    sum        the cross-entropy summed over rows
    pairs      the DPO loss of branches of equal length, without a reference, mean over pairs
    products   nothing: matrix products of the same sizes, gradients included, as a floor
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1  # of the DPO loss


@dataclass(frozen=True)
class Problem:
    """hidden (R, D), weight (V, D), target (R,) int64, upstream (R,) float32; branches of `length` rows, chosen first.

    What needs a gradient follows the mode: hidden and weight ("full"), hidden ("frozen"), nothing ("logp").
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    upstream: Tensor
    length: int
    mode: str

    @property
    def branches(self) -> tuple[Tensor, Tensor]:
        """hidden (2P, L, D) and target (2P, L)"""
        return self.hidden.unflatten(0, (-1, self.length)), self.target.view(-1, self.length)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def branch_length(rows: int) -> int:
    """The longest branch of at most 64 rows of which `rows`, an even number, makes whole pairs."""
    return max(length for length in range(1, 65) if rows % (2 * length) == 0)


@dataclass(frozen=True)
class Way:
    """One way to compute the head.

    run:         Problem -> what `objective` says
    objective:   rows, sum, pairs or products
    logits:      how many float32 [R, V] it holds at its peak, measured or read, to stay within the machine's memory
    sums:        it holds dW in float32 beside the one that it returns
    took:        Problem -> a word on what it chose by itself
    """

    run: Callable[[Problem], Tensor]
    objective: str = "rows"
    logits: float = 0.0
    sums: bool = False
    took: Callable[[Problem], str] | None = None


def loss_of(way: Way, problem: Problem) -> tuple[Tensor, Tensor]:
    """(what it returned, scalar to take the gradient of)"""
    result = way.run(problem)
    if way.objective == "rows":
        return result, (problem.upstream * result).sum()
    return result, result


# ---- the floor ------------------------------------------------------------------------------------------------------


def matrix_products(problem: Problem, linear: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """X W^T, then P W for dX, then P^T X for dW, with the first product's result as P; linear(a, b) is a b^T."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    outputs = [linear(hidden, weight)]  # (R, V)
    if problem.mode != "logp":
        outputs.append(linear(outputs[0], weight.T))  # (R, D)
    if problem.mode == "full":
        outputs.append(linear(outputs[0].T, hidden.T))  # (V, D)
    return outputs


def plain(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def products(linear: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Problem], Tensor]:
    return lambda problem: matrix_products(problem, linear)[-1][0, 0].float()


def bytes_of_weight(problem: Problem) -> Tensor:
    """Reads W and writes a dW; without one half of W is copied, which moves as many bytes as reading it does."""
    weight = problem.weight.detach()
    return (weight if problem.mode == "full" else weight[: len(weight) // 2]).clone()[0, 0].float()


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(impl: str) -> Callable[[Problem], Tensor]:
    def run(problem: Problem) -> Tensor:
        from stepdpo_kernels.ops.linear_logprob import linear_logprob

        return linear_logprob(problem.hidden, problem.weight, problem.target, impl=impl)

    return run


def auto_choice(problem: Problem) -> str:
    from stepdpo_kernels import _dispatch

    inputs = {"hidden": problem.hidden, "weight": problem.weight, "target": problem.target}
    return f"took {_dispatch.choose('linear_logprob', 'auto', {**inputs, **OPTIONS}).name}"


OPTIONS = {"bias": None, "softcap": None, "logit_scale": None}


def ours_memory(problem: Problem) -> Tensor:
    from stepdpo_kernels.ops.linear_logprob import cpu_kernel

    inputs = {"hidden": problem.hidden, "weight": problem.weight, "target": problem.target}
    reasons = cpu_kernel.why_not({**inputs, **OPTIONS})
    if reasons:
        raise ValueError(f"implementation 'cpu' cannot take these inputs: {'; '.join(reasons)}")
    return cpu_kernel.linear_logprob(problem.hidden, problem.weight, problem.target, extra_bytes=0)


def ours_loss(problem: Problem) -> Tensor:
    from stepdpo_kernels.loss import StepDPOLoss

    hidden, labels = problem.branches
    return StepDPOLoss(beta=BETA, reference_free=True)(hidden, problem.weight, labels).loss


# ---- peers ----------------------------------------------------------------------------------------------------------


def eager(problem: Problem) -> Tensor:
    logits = F.linear(problem.hidden, problem.weight).float()
    return logits.log_softmax(dim=-1).gather(1, problem.target[:, None])[:, 0]


def eager_compiled(problem: Problem) -> Tensor:
    return _compiled_eager()(problem.hidden, problem.weight, problem.target)


@cache
def _compiled_eager() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear(hidden, weight).float().log_softmax(dim=-1).gather(1, target[:, None])[:, 0]

    return torch.compile(logprob)


def trl_selective(problem: Problem) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    hidden, labels = problem.branches
    return selective_log_softmax(F.linear(hidden, problem.weight), labels).flatten().float()


def trl_chunked(problem: Problem) -> Tensor:
    from trl.trainer import utils

    # As add_fused_lm_head's forward calls it: temperature 1, no softcap, scale 1, log-probs alone.
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    outputs = ("log_probs",)
    return utils._ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.target, 1.0, chunk, None, 1.0, outputs
    )[0]


def liger_dpo(problem: Problem) -> Tensor:
    hidden, labels = problem.branches
    return _liger_loss()(problem.weight, hidden, labels)[0]


@cache
def _liger_loss() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=True)


def cut_cross_entropy(problem: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(problem.hidden, problem.weight, problem.target, reduction="none", impl=impl)


def torch_linear_ce(problem: Problem) -> Tensor:
    return -_torch_linear_ce()(problem.hidden, problem.weight, problem.target, reduction="none")


def torch_linear_ce_chunked(problem: Problem) -> Tensor:
    function, options = _torch_linear_ce(), torch.nn.LinearCrossEntropyOptions
    # On CPUs the automatic choice, chunks of few rows, is many times slower than one chunk.
    chosen = options() if problem.hidden.is_cuda else options(acc_policy="accurate", chunking_method=None)
    return -function(problem.hidden, problem.weight, problem.target, reduction="none", options=chosen)


def _torch_linear_ce() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ModuleNotFoundError("this torch has no linear_cross_entropy", name="linear_cross_entropy")
    return F.linear_cross_entropy


def quack(problem: Problem) -> Tensor:
    peer = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return peer(problem.hidden, problem.weight, problem.target, reduction="sum")


WAYS: dict[str, Way] = {
    "products": Way(products(plain), "products", logits=0.5),
    "products-onednn": Way(products(onednn), "products", logits=1),
    "bytes": Way(bytes_of_weight, "products"),
    "ours": Way(ours("auto"), took=auto_choice),
    "ours-memory": Way(ours_memory),
    "ours-triton-chunked": Way(ours("triton_chunked"), logits=1),
    "ours-triton-fused": Way(ours("triton_fused")),
    "ours-loss": Way(ours_loss, "pairs"),
    "eager": Way(eager, logits=3),
    "eager-compiled": Way(eager_compiled, logits=2.5),
    "trl-selective": Way(trl_selective, logits=3),
    "trl-chunked": Way(trl_chunked, logits=0.25, sums=True),
    "liger-dpo": Way(liger_dpo, "pairs"),
    "cut-cross-entropy": Way(cut_cross_entropy, logits=2.5),
    "torch-linear-ce": Way(torch_linear_ce, logits=3),
    "torch-linear-ce-chunked": Way(torch_linear_ce_chunked, logits=3),
    "quack": Way(quack, "sum", logits=0.5),
}
