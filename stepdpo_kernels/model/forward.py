"""Running a transformers causal language model on a packed forest."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdpo_kernels.model.attention import SignedPlan, no_mask, use_tree_attention
from stepdpo_kernels.model.support import causal_lm, check_supported
from stepdpo_kernels.types import PackedBatch, StepDPOError

# (hidden (T, D), the model's output embedding) -> anything
Head = Callable[[Tensor, nn.Module], Any]


def packed_forward(model: Any, batch: PackedBatch) -> Tensor:
    """Hidden states of a packed forest: what the language-model head would be applied to.

    Equals, token for token, what the model computes for each branch on its own.

    Args:
        model: a transformers causal language model (SUPPORTED_MODEL_TYPES), also wrapped by PEFT. Call
            `enable_packed_forward` instead where FSDP, ZeRO or DDP wraps the model. The model is switched to the
            attention implementation `stepdpo_tree`, under which ordinary calls compute SDPA.
        batch: on the model's device.

    Returns:
        (T, D) in the model's dtype.

    Raises:
        StepDPOError: a model that cannot be packed, with every reason, or one that kept the plan from a layer.
    """
    check_supported(model)
    return _backbone(causal_lm(model), batch)


def enable_packed_forward(model: Any) -> None:
    """Teaches a model's own forward to take packed batches, before FSDP, ZeRO or DDP wraps it.

    Afterwards `model(packed_batch=batch, head=f)` returns `f(hidden, output_embedding)`, computed inside the
    wrapped forward, so that sharded weights are gathered and gradient hooks run. Calls without packed_batch are as
    before. Raises StepDPOError for a model that cannot be packed.
    """
    check_supported(model)
    lm = causal_lm(model)
    use_tree_attention(lm)
    if not hasattr(lm, "_forward_without_packing"):
        lm._forward_without_packing = lm.forward
        lm.forward = MethodType(_packed_or_plain(type(lm)), lm)


def disable_packed_forward(model: Any) -> None:
    """Undoes `enable_packed_forward`."""
    lm = causal_lm(model)
    if hasattr(lm, "_forward_without_packing"):
        before = lm._forward_without_packing
        del lm._forward_without_packing, lm.forward
        if getattr(before, "__func__", None) is not type(lm).forward:  # somebody else's, on this instance
            lm.forward = before


def _packed_or_plain(model_class: type[PreTrainedModel]) -> Callable[..., Any]:
    @wraps(model_class.forward)  # generate() and Trainer look names up in its signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        packed_batch: PackedBatch | None = None,
        head: Head | None = None,
        **kwargs: Any,
    ) -> Any:
        if packed_batch is None:
            return self._forward_without_packing(*args, **kwargs)
        if head is None:
            raise ValueError("packed_batch needs head=, a function of (hidden, output_embedding)")
        return head(_backbone(self, packed_batch), self.get_output_embeddings())

    return forward


def _backbone(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    use_tree_attention(lm)
    plan = SignedPlan(batch.plan)
    hidden = lm.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=no_mask(batch.input_ids.device),
        use_cache=False,
        stepdpo_plan=plan,
    ).last_hidden_state[0]
    if len(plan.layers) != lm.config.num_hidden_layers:
        raise StepDPOError(
            f"model {type(lm).__name__}: {len(plan.layers)} of {lm.config.num_hidden_layers} layers used the packing "
            "plan, so its attention would mix up branches; this model cannot be packed"
        )
    return hidden
