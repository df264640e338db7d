"""The layers of a transformers model on a packed forest, and what must hold of every such pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels.model.attention import SignedPlan, no_mask, use_tree_attention
from stepdpo_kernels.model.support import max_path
from stepdpo_kernels.types import PackedBatch, StepDPOError


def backbone(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """(T, D): hidden states of a packed forest, before the language-model head. Raises as `backbone_outputs`."""
    return backbone_outputs(lm, batch).last_hidden_state[0]


def backbone_outputs(lm: PreTrainedModel, batch: PackedBatch, **kwargs: Any) -> Any:
    """What the layers give for a packed forest, a batch of one, called with further `kwargs`.

    Raises StepDPOError for a branch that is too long for the model's rotary embedding, and where a layer did without
    the plan or attended with another window than the model's configuration says.
    """
    longest = max_path(lm.config)
    if longest is not None and batch.plan.max_k > longest:
        raise StepDPOError(
            f"a branch of {batch.plan.max_k} encoded tokens is longer than {longest}, beyond which the rotary "
            f"embedding of {type(lm).__name__} depends on the longest text in a batch: leave such pairs out"
        )
    use_tree_attention(lm)
    plan = SignedPlan(batch.plan)
    outputs = lm.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=no_mask(batch.input_ids.device),
        use_cache=False,
        stepdpo_plan=plan,
        **kwargs,
    )
    _check_signatures(lm, plan)
    return outputs


def _check_signatures(lm: PreTrainedModel, plan: SignedPlan) -> None:
    layers = lm.config.num_hidden_layers
    if set(plan.windows) != set(range(layers)):
        raise StepDPOError(
            f"model {type(lm).__name__}: {len(plan.windows)} of {layers} layers used the packing plan, so its "
            "attention would mix up branches; this model cannot be packed"
        )
    for layer, expected in enumerate(_windows(lm.config)):
        if plan.windows[layer] != expected:
            raise StepDPOError(
                f"model {type(lm).__name__}: layer {layer} attended with a window of {plan.windows[layer]} where its "
                f"configuration says {expected}; this model cannot be packed"
            )


def _windows(config: Any) -> list[int | None]:
    """The sliding window of every layer by the configuration; a window without types of layers is for all."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
