"""What TRL before 1.15 asks of logits, answered from the log-probs and statistics of the tokens that matter.

Those versions of its DPOTrainer take the logits of a batch, (2P, W, V), and ask of them: log-probs of the labels and
entropy by functions of their own, which are told to read them here; their mean, their argmax, to compare it with the
labels; logsumexp of them and of twice them (WPO); the cross-entropy with the labels ("sft").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenLogits:
    """Stands for logits (2P, W-1, V), shifted so that each place predicts its label.

    All fields are tensors (2P, W-1); of a reference, log_probs and labels alone are there. It answers as logits do
    from which their logsumexp was subtracted, but for their mean.
    """

    log_probs: Any
    entropy: Any
    log_sum_sq_probs: Any
    mean_logits: Any
    is_top1: Any
    labels: Any
    factor: float = 1.0

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenLogits:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(x) if isinstance(x, Tensor) else x for name, x in values.items()}
        return TokenLogits(**mapped)

    def __getitem__(self, key: Any) -> TokenLogits:
        if isinstance(key, Tensor):  # a mask of the places
            return self._map(lambda x: x[key])
        if key == (..., slice(None, -1), slice(None)):  # the last place predicts nothing, and is left out already
            return self
        raise NotImplementedError(f"TRL asked for logits[{key}], which only logits in memory could answer")

    def __rmul__(self, factor: float) -> TokenLogits:
        return replace(self, factor=self.factor * factor)

    def chunk(self, chunks: int, dim: int = 0) -> list[TokenLogits]:
        return [self._map(lambda x, i=i: x.chunk(chunks, dim)[i]) for i in range(chunks)]  # type: ignore[misc]

    def detach(self) -> TokenLogits:
        return self._map(Tensor.detach)

    def size(self, dim: int) -> int:
        return self.log_probs.size(dim)

    def mean(self, dim: int) -> Tensor:
        return self.mean_logits

    def argmax(self, dim: int) -> Tensor:
        """The label where it is the likeliest token, else -1, which is no label."""
        return torch.where(self.is_top1, self.labels, -1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        logits = args[0]
        if func is torch.logsumexp and logits.factor == 1.0:
            return torch.zeros_like(logits.entropy)
        if func is torch.logsumexp and logits.factor == 2.0:
            return logits.log_sum_sq_probs
        if func is F.cross_entropy:
            return -logits.log_probs.mean()
        raise NotImplementedError(f"TRL asked for {func.__name__} of logits, which only logits in memory could answer")


_users = 0
_originals: dict[str, Any] = {}


def _log_probs(logits: TokenLogits, *_: Any, **__: Any) -> Tensor:
    return logits.log_probs


def _entropy(logits: TokenLogits, *_: Any, **__: Any) -> Tensor:
    return logits.entropy


def _both(logits: TokenLogits, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return logits.log_probs, logits.entropy


_ANSWERS = {
    "selective_log_softmax": _log_probs,
    "entropy_from_logits": _entropy,
    "selective_log_softmax_and_entropy": _both,
}


@contextmanager
def answer_for_logits() -> Iterator[None]:
    """Has the functions that TRL's DPOTrainer applies to logits answer TokenLogits, too; leaves none of it behind."""
    from trl.trainer import dpo_trainer

    global _users
    if not _users:
        _originals.update({name: getattr(dpo_trainer, name) for name in _ANSWERS if hasattr(dpo_trainer, name)})
        for name, original in _originals.items():
            setattr(dpo_trainer, name, _either(_ANSWERS[name], original))
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            for name, original in _originals.items():
                setattr(dpo_trainer, name, original)
            _originals.clear()


def _either(answer: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def function(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return (answer if isinstance(logits, TokenLogits) else original)(logits, *args, **kwargs)

    return function
