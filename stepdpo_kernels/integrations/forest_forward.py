"""Models whose own forward also takes the forest of a padded batch, so that DDP, FSDP and ZeRO see one call of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn

from stepdpo_kernels.model import causal_lm, check_supported, padded_logps
from stepdpo_kernels.packing import PaddedForest
from stepdpo_kernels.types import StepDPOError


class Accelerated(ExitStack):
    """What was done to a trainer; `remove()`, or leaving it as a context, undoes it."""

    def remove(self) -> None:
        """Restores the trainer and its models."""
        self.close()


def add_forest_forward(model: nn.Module) -> Callable[[], None]:
    """Lets `model(stepdpo_forest=forest, statistics=...)` return `padded_logps`; other calls are as before.

    Returns a function that undoes it: the model's forward and its attention are then what they were. Where somebody
    has wrapped that forward since, it stays inside, and hands every other call on.

    Raises StepDPOError for a model that cannot be packed, and for one whose head has hooks.
    """
    check_supported(model)
    lm: Any = causal_lm(model)
    if lm.get_output_embeddings()._forward_hooks:
        raise StepDPOError(
            f"the language-model head of {type(lm).__name__} has hooks on its output, which is no longer computed: "
            "leave out what adds them (LLaMA-Factory: upcast_lmhead_output; the log-probs are float32 without it)"
        )
    attention, own, plain = lm.config._attn_implementation, vars(lm).get("forward"), lm.forward

    @wraps(type(lm).forward)  # trainers look names up in its signature
    def forward(
        self: Any, *args: Any, stepdpo_forest: PaddedForest | None = None, statistics: bool = False, **kwargs: Any
    ) -> Any:
        if stepdpo_forest is None:
            return plain(*args, **kwargs)
        return padded_logps(self, stepdpo_forest, statistics=statistics)

    ours = lm.forward = MethodType(forward, lm)

    def undo() -> None:
        lm.config._attn_implementation = attention
        vars(lm).pop("_verify_packing", None)
        if vars(lm).get("forward") is ours:
            del lm.forward
            if own is not None:
                lm.forward = own

    return undo
