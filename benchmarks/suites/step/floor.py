"""The floor of a model's work on pairs: matrix products over tokens that are held once, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class LinearProducts:
    """Products of every linear layer with tokens, and of the head with loss rows; no attention, no element-wise work.

    model:  its weights are used as they are, on their device
    sizes:  (tokens, loss rows) of each batch
    """

    def __init__(self, model: Any, sizes: Sequence[tuple[int, int]]) -> None:
        head = model.get_output_embeddings()
        layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        self._layers = [layer.weight.detach() for layer in layers]
        self._head = head.weight.detach()
        widths = {n for weight in self._layers for n in weight.shape}
        tokens, rows = (max((size[i] for size in sizes), default=0) for i in (0, 1))
        of = {"dtype": self._head.dtype, "device": self._head.device}
        self._of_tokens = {n: torch.randn(tokens, n, **of) for n in widths}
        self._of_rows = {n: torch.randn(rows, n, **of) for n in self._head.shape}

    def run(self, tokens: int, rows: int, products: int) -> None:
        """products: 1, forward; 2, also for the gradient of the inputs; 3, also for that of the weights"""
        work = [(weight, self._of_tokens, tokens) for weight in self._layers]
        for weight, inputs, count in (*work, (self._head, self._of_rows, rows)):
            x, dy = inputs[weight.shape[1]][:count], inputs[weight.shape[0]][:count]
            torch.mm(x, weight.T)
            if products > 1:
                torch.mm(dy, weight)
            if products > 2:
                torch.mm(dy.T, x)
