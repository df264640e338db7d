"""One optimiser step's loss and gradients, by packed forests and by the plain padded eager model (invariant I1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.loss.reference import step_dpo_loss
from stepdpo_kernels.model import causal_lm, head_options, packed_forward
from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.types import PackedBatch, StepPair
from tests.families import FAMILIES
from tests.numerics import relative_error

TOLERANCE = 1e-5

SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
# name -> (kind, config): the arguments of tiny_model
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("qwen2", {**SLIDING, "num_hidden_layers": 3}),
}


def training_model(
    tiny_model: Callable[..., PreTrainedModel], which: str, training: str = "full", **more: Any
) -> PreTrainedModel:
    """One of MODELS in train mode; training: "full", "checkpointing", "lora" or "lora and checkpointing"."""
    kind, config = MODELS[which]
    return prepared(tiny_model(kind, **{**config, **more}), training)


def family_model(
    tiny_model: Callable[..., PreTrainedModel], kind: str, training: str = "full", **more: Any
) -> PreTrainedModel:
    """One of FAMILIES with all that it is known for; otherwise as training_model."""
    return prepared(tiny_model(kind, **{**FAMILIES[kind].config, **more}), training)


def prepared(model: PreTrainedModel, training: str) -> PreTrainedModel:
    model.train()
    if "lora" in training:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = get_peft_model(model, lora)
    if "checkpointing" in training:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


@dataclass
class Step:
    """A loss and the gradient of every parameter that has one."""

    loss: float
    gradients: dict[str, Tensor]


def _step(model: torch.nn.Module, loss: float) -> Step:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return Step(loss, gradients)


def plain_step(model: PreTrainedModel, pairs: Sequence[StepPair], ref_logps: Tensor) -> Step:
    """Every branch with its own prefix, padded; transformers' eager attention; full logits; the paper's formula."""
    model.set_attn_implementation("eager")  # the model behind PEFT's wrapper as well
    assert causal_lm(model).config._attn_implementation == "eager"
    batch = padded_batch(pairs)
    labels = batch.pop("labels")
    weights = torch.tensor([pair.weight for pair in pairs])
    loss = step_dpo_loss(model(**batch, use_cache=False).logits, labels, ref_logps, weights=weights)
    loss.backward()
    return _step(model, loss.item())


def packed_step(
    model: PreTrainedModel, batches: Sequence[PackedBatch], ref_logps: Tensor, *, num_pairs: int, impl: str = "auto"
) -> Step:
    """The same from packed forests, one backward for each; ref_logps (2 * num_pairs,) are those of all pairs."""
    total, loss_fn = 0.0, StepDPOLoss(impl=impl, **head_options(model))
    for batch in batches:
        hidden = packed_forward(model, batch)
        refs = torch.cat([ref_logps[batch.pair_index], ref_logps[num_pairs + batch.pair_index]])
        weight: Any = causal_lm(model).get_output_embeddings().weight
        out = loss_fn.packed(hidden, weight, batch, refs, num_pairs=num_pairs)
        out.loss.backward()
        total += out.loss.item()
    return _step(model, total)


@torch.no_grad()
def references_near(model: PreTrainedModel, pairs: Sequence[StepPair]) -> Tensor:  # (2P,)
    """The policy's own log-probs, a few nats off: margins of either sign, and no pair's coefficient is near 0 or 1."""
    batch = padded_batch(pairs)
    labels = batch.pop("labels")
    logps = model(**batch).logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    noise = torch.randn(len(labels), generator=torch.Generator().manual_seed(7))
    return (logps * (labels != -100)).sum(1) + 2 * noise


def errors(ours: Step, plain: Step) -> dict[str, float]:
    """Relative error of the loss and of each gradient."""
    assert set(ours.gradients) == set(plain.gradients)
    found = {name: relative_error(ours.gradients[name], plain.gradients[name]) for name in plain.gradients}
    return {"loss": abs(ours.loss - plain.loss) / abs(plain.loss), **found}


def worst(ours: Step, plain: Step) -> tuple[float, str]:
    """The largest relative error and where it is; a NaN counts as infinite."""
    return max((error if error == error else float("inf"), name) for name, error in errors(ours, plain).items())


def assert_exact(ours: Step, plain: Step) -> None:
    error, name = worst(ours, plain)
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"
