"""Checks of values, which on GPUs must not wait for them."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_second_derivative(what: str) -> None:
    """Raises RuntimeError in a backward that is to be differentiated, which runs with gradients enabled."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivative; use impl='reference'")


def check_below(index: Tensor, size: int, name: str, where: str) -> None:
    """Raises ValueError where an entry of `index` (N,) int64 is not in [0, size), as in "chosen holds 7, outside ...".

    On CUDA a device-side assertion, to spare a synchronisation; under torch.compile a RuntimeError.
    """
    in_range = ((index >= 0) & (index < size)).all()
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(in_range, f"{name} holds a number outside {where}")
    elif not in_range:
        worst = int(index[((index < 0) | (index >= size)).nonzero()[0, 0]])
        raise ValueError(f"{name} holds {worst}, outside {where} 0..{size - 1}")
