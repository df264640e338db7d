"""The benchmarks' worker, with providers of the head suite that go wrong in every way."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites.head.providers import WAYS, Problem, Way, eager
from benchmarks.worker import main


def wrong_gradient(problem: Problem) -> Tensor:
    """The right log-probs, without the gradient of their normaliser."""
    logits = F.linear(problem.hidden, problem.weight).float()
    return logits.gather(1, problem.target[:, None])[:, 0] - logits.logsumexp(dim=1).detach()


def absent(problem: Problem) -> Tensor:
    raise ModuleNotFoundError("No module named 'peer'", name="peer")


def dies_when_large(problem: Problem) -> Tensor:
    if problem.weight.shape[0] > 1000:  # more than what is verified
        os._exit(3)
    return eager(problem)


def without_memory_when_large(problem: Problem) -> Tensor:
    if problem.weight.shape[0] > 1000:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
    return eager(problem)


def refuses(problem: Problem) -> Tensor:
    raise NotImplementedError("no CPU")


if __name__ == "__main__":
    WAYS |= {
        "eager": Way(wrong_gradient),
        "trl-selective": Way(absent),
        "trl-chunked": Way(dies_when_large),
        "liger-dpo": Way(without_memory_when_large),
        "torch-linear-ce": Way(refuses),
    }
    main()
