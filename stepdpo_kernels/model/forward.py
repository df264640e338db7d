"""Running a transformers causal language model on a packed forest."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdpo_kernels.model.attention import use_tree_attention
from stepdpo_kernels.model.backbone import backbone
from stepdpo_kernels.model.support import causal_lm, check_supported, is_tested
from stepdpo_kernels.model.verify import verify_first_batch
from stepdpo_kernels.types import PackedBatch

# (hidden (T, D), the model's output embedding) -> anything
Head = Callable[[Tensor, nn.Module], Any]


def packed_forward(model: Any, batch: PackedBatch) -> Tensor:
    """Hidden states of a packed forest: what the language-model head would be applied to.

    Equals, token for token, what the model computes for each branch on its own. What the model does to its logits
    after the head, `head_options` says.

    Args:
        model: a transformers causal language model, also wrapped by PEFT. Call `enable_packed_forward` instead where
            FSDP, ZeRO or DDP wraps the model. The model is switched to tree attention, under which ordinary calls
            compute what they did before. One whose architecture is not in SUPPORTED_MODEL_TYPES is first compared
            with itself on the first batch (`verify_first_batch`).
        batch: on the model's device.

    Returns:
        (T, D) in the model's dtype.

    Raises:
        StepDPOError: a model that cannot be packed, with every reason, one that kept the plan from a layer, one that
            failed `verify_first_batch`, or a branch beyond the length up to which its rotary embedding is fixed.
    """
    check_supported(model)
    lm = causal_lm(model)
    verify_once(lm, batch)
    return backbone(lm, batch)


def enable_packed_forward(model: Any, *, verify: bool | None = None) -> None:
    """Teaches a model's own forward to take packed batches, before FSDP, ZeRO or DDP wraps it.

    Afterwards `model(packed_batch=batch, head=f)` returns `f(hidden, output_embedding)`, computed inside the
    wrapped forward, so that sharded weights are gathered and gradient hooks run. Calls without packed_batch are as
    before. Raises StepDPOError for a model that cannot be packed.

    verify: whether the first batch is also run branch by branch and compared (`verify_first_batch`). None: where the
        architecture is not in SUPPORTED_MODEL_TYPES.
    """
    check_supported(model)
    lm: Any = causal_lm(model)
    use_tree_attention(lm)
    lm._verify_packing = not is_tested(lm) if verify is None else verify
    if not hasattr(lm, "_forward_without_packing"):
        lm._forward_without_packing = lm.forward
        lm.forward = MethodType(_packed_or_plain(type(lm)), lm)


def disable_packed_forward(model: Any) -> None:
    """Undoes `enable_packed_forward`."""
    lm = causal_lm(model)
    if hasattr(lm, "_forward_without_packing"):
        before = lm._forward_without_packing
        del lm._forward_without_packing, lm._verify_packing, lm.forward
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
        verify_once(self, packed_batch)
        return run_head(self, head, backbone(self, packed_batch))

    return forward


def run_head(lm: Any, head: Head, hidden: Tensor) -> Any:
    """head(hidden, lm_head) as the forward of lm_head, around which FSDP2 and ZeRO-3 gather its sharded weight."""
    lm_head = lm.get_output_embeddings()
    own = vars(lm_head).get("forward")
    lm_head.forward = lambda hidden: head(hidden, lm_head)
    try:
        return lm_head(hidden)
    finally:
        del lm_head.forward
        if own is not None:
            lm_head.forward = own


def verify_once(lm: Any, batch: PackedBatch) -> None:
    """Compares the first batch of a model with the model itself, where that was asked for or it is not tested."""
    if getattr(lm, "_verify_packing", None) is None:
        lm._verify_packing = not is_tested(lm)
    if lm._verify_packing:
        lm._verify_packing = not verify_first_batch(lm, batch)
