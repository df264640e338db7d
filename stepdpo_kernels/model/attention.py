"""`stepdpo_tree_*`, attention implementations of transformers: tree attention where a plan is passed, else the model's.

The plan reaches the attention layers as the keyword argument `stepdpo_plan` of the model's forward, which gradient
checkpointing keeps. An ordinary forward (generation, evaluation) passes none and gets the implementation that the
model had before it was switched, mask included, so a model can stay switched; its name stands in the name of ours:
`stepdpo_tree_sdpa`. A model that drops the argument on its way would be silently wrong; each layer therefore signs the
plan, and `packed_forward` counts the signatures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stepdpo_kernels.ops.tree_attention import tree_attention
from stepdpo_kernels.types import StepDPOError, TreePlan

PREFIX = "stepdpo_tree_"
# Arguments that leave the scores as they are. A layer that passes another one computes something else.
_LEAVES_SCORES = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


class SignedPlan:
    """A plan on its way through a model, and the layers that used it, each with its sliding window.

    No dataclass: of one FSDP2 makes a copy for each layer when it casts inputs.
    """

    def __init__(self, plan: TreePlan) -> None:
        self.plan = plan
        self.windows: dict[int, int | None] = {}


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile is for what stands around its kernels
def tree_attention_forward(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d)
    value: Tensor,  # (1, G, T, e)
    attention_mask: Tensor | None,
    stepdpo_plan: SignedPlan,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,)
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, H, e)
    """Tree attention with the arguments that transformers' layers give an attention function.

    Raises ValueError for what tree attention does not compute: dropout, a batch of more than one forest, a mask of
    the layer's own, and any argument that may change the scores in another way than a window, a softcap or sinks.
    """
    name = type(module).__name__
    if dropout:
        raise ValueError(f"tree attention has no dropout, got {dropout}: set the model's attention_dropout to 0.0")
    changed = sorted(k for k, v in kwargs.items() if v is not None and k not in _LEAVES_SCORES)
    if kwargs.get("is_causal") is False:
        changed.append("is_causal=False")
    if changed:
        raise ValueError(f"tree attention cannot apply {', '.join(changed)} of {name}")
    if attention_mask is not None and attention_mask.numel():
        raise ValueError(f"tree attention cannot apply a mask of {name}'s own")
    if query.shape[0] != 1:
        raise ValueError(f"a packed forest is a batch of 1, got {query.shape[0]}")
    if sliding_window is None:  # qwen2_moe leaves it to the mask
        sliding_window = getattr(module, "sliding_window", None)
    stepdpo_plan.windows[int(module.layer_idx)] = sliding_window  # type: ignore[arg-type]
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
    return output[None].contiguous(), None  # some layers take views of it


def _ordinary(attention: type[nn.Module], implementation: str) -> Callable[..., Any]:
    """What layers of this class call for an implementation: transformers', or that of the file that defines them."""
    for base in attention.__mro__:
        names = vars(sys.modules[base.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in names:
            functions = names["ALL_ATTENTION_FUNCTIONS"]
            if implementation in functions:
                return functions[implementation]
            if implementation == "eager" and "eager_attention_forward" in names:
                return names["eager_attention_forward"]
    raise StepDPOError(f"{attention.__name__}: nothing in its file computes the attention {implementation!r}")


def _tree_or(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stepdpo_plan: SignedPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Tree attention, or the implementation `before` where no plan is passed.

    Raises StepDPOError where a packed forward lost its plan on the way, otherwise as `tree_attention_forward`.
    """
    if stepdpo_plan is not None:
        return tree_attention_forward(module, query, key, value, attention_mask, stepdpo_plan, **kwargs)
    if attention_mask is not None and not attention_mask.numel():  # no_mask: a packed forward, and the plan is lost
        raise StepDPOError(
            f"{type(module).__name__} was not given the packing plan, so its attention would mix up branches; "
            "this model cannot be packed"
        )
    ordinary = _ordinary(type(module), before)
    if "flash" not in before:
        return ordinary(module, query, key, value, attention_mask, **kwargs)
    config: Any = module.config  # transformers' functions for FlashAttention look their own name up in it
    switched, config._attn_implementation = config._attn_implementation, before
    try:
        return ordinary(module, query, key, value, attention_mask, **kwargs)
    finally:
        config._attn_implementation = switched


def _register(before: str) -> str:
    """The name of tree attention for a model whose implementation was `before`."""
    name = PREFIX + before
    if name not in AttentionInterface():
        AttentionInterface.register(name, partial(_tree_or, before))
        masks = AttentionMaskInterface()
        if before in masks:  # else transformers builds none
            AttentionMaskInterface.register(name, masks[before])
    return name


for _before in ("eager", "sdpa"):  # for a switched model that another process unpickles
    _register(_before)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Switches a model to tree attention, once; ordinary calls of it then compute what they did before."""
    before = model.config._attn_implementation or "eager"
    if not before.startswith(PREFIX):
        # Not set_attn_implementation, which for a name with "flash" in it looks for a kernel.
        model.config._attn_implementation = _register(before)


def use_ordinary_attention(model: PreTrainedModel) -> None:
    """Undoes `use_tree_attention`."""
    name = model.config._attn_implementation
    if name is not None:
        model.config._attn_implementation = name.removeprefix(PREFIX)


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before it was switched."""
    name = model.config._attn_implementation
    use_ordinary_attention(model)
    try:
        yield
    finally:
        model.config._attn_implementation = name


def no_mask(device: torch.device) -> Tensor:
    """What to pass as attention mask beside a plan: a 4D mask is handed on as it is and saves building one.

    It is empty, so that a layer which ignored the plan and used it would fail on its shape.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
