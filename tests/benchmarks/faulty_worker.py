"""The worker of the head suite with providers that go wrong in every way."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor

from benchmarks.head_providers import PROVIDERS, Problem, Provider, eager
from benchmarks.head_worker import main


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


if __name__ == "__main__":
    PROVIDERS |= {
        "eager": Provider(wrong_gradient),
        "trl-selective": Provider(absent),
        "trl-chunked": Provider(dies_when_large),
        "liger-dpo": Provider(without_memory_when_large),
    }
    main()
