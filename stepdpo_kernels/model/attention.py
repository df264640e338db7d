"""`stepdpo_tree`, an attention implementation of transformers: tree attention where a plan is passed, else SDPA.

The plan reaches the attention layers as the keyword argument `stepdpo_plan` of the model's forward, which gradient
checkpointing keeps. An ordinary forward (generation, evaluation) passes none and gets transformers' own SDPA, mask
included, so a model can stay switched. A model that drops the argument on its way would be silently wrong; each
layer therefore signs the plan, and `packed_forward` counts the signatures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stepdpo_kernels.ops.tree_attention import tree_attention
from stepdpo_kernels.types import StepDPOError, TreePlan

NAME = "stepdpo_tree"
# Arguments that change the scores; a layer that passes one would get wrong probabilities without it.
_CHANGES_SCORES = ("position_bias", "cache")


@dataclass
class SignedPlan:
    """A plan on its way through a model, and the layers that used it."""

    plan: TreePlan
    layers: set[int] = field(default_factory=set)


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d)
    value: Tensor,  # (1, G, T, e)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,)
    stepdpo_plan: SignedPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, H, e)
    """The function registered with transformers' AttentionInterface.

    Raises StepDPOError where a packed forward lost its plan on the way, and ValueError for what tree attention does
    not compute: dropout, a batch of more than one forest, scores that are capped, biased or given sinks.
    """
    if stepdpo_plan is None:
        if attention_mask is not None and not attention_mask.numel():  # no_mask: a packed forward, and the plan is lost
            raise StepDPOError(
                f"{type(module).__name__} was not given the packing plan, so its attention would mix up branches; "
                "this model cannot be packed"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"tree attention has no dropout, got {dropout}: set the model's attention_dropout to 0.0")
    changed = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    if changed:
        raise ValueError(f"tree attention cannot apply {', '.join(changed)} of {type(module).__name__}")
    if query.shape[0] != 1:
        raise ValueError(f"a packed forest is a batch of 1, got {query.shape[0]}")
    stepdpo_plan.layers.add(int(module.layer_idx))  # type: ignore[arg-type]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    output = tree_attention(
        q,
        k,
        v,
        stepdpo_plan.plan,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output[None], None


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Switches a model to `stepdpo_tree`, once; ordinary calls of it then compute transformers' SDPA."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


def no_mask(device: torch.device) -> Tensor:
    """What to pass as attention mask beside a plan: a 4D mask is handed on as it is and saves building one.

    It is empty, so that a layer which ignored the plan and used it would fail on its shape.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
