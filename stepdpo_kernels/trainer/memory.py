"""How much memory training takes for each process, from sizes alone: nothing is run.

What is counted, in bytes, with W processes, and where the formulas come from:

    weights, gradients,   as they are stored; Adam keeps two numbers more for each trained one. FSDP and ZeRO-3 store
    optimizer             1/W of each; ZeRO-3 trains a float32 copy of weights in bfloat16: 2 + 2 + 12 bytes a parameter
                          (Rajbhandari et al. 2020, arXiv 1910.02054, section 3)
    gathered              what a process holds of weights and gradients beside its own. Autocast: float32 weights once
                          more in the dtype of compute. DDP: its buckets, as large as the gradients. FSDP and ZeRO-3: a
                          layer in use and the next one, its gradients before they are scattered and, in float32, while
                          they are (Zhao et al. 2023, arXiv 2304.11277), and likewise embeddings and head, which stay
                          from forward to backward
    activations           what the layers of transformers' Llama save for backward, counted below; with checkpointing
                          a layer's input for each layer, and one layer in full (Chen et al. 2016, arXiv 1604.06174)
    head                  the logits of 1,024 rows in float32; of a trained head also the probabilities that are kept
                          and its gradient, with many rows also in float32
                          (stepdpo_kernels/ops/linear_logprob/README.md)

Not counted: the device's own context, buffers of communication, and fragmentation.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import nn

from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.types import StepDPOError

SHARDINGS = ("none", "ddp", "fsdp", "zero3")
CHUNK_ROWS = 1024  # rows whose float32 logits the head holds at once on a GPU
LEAST_WORK = 1 << 37  # multiplications of a product of rows that the head takes gradients of in forward
# Bytes of state for each trained parameter, by `TrainingArguments.optim`. Adam keeps two numbers of the parameter's
# dtype; what is not listed is taken for Adam.
_STATES = {
    "adafactor": 0,
    "sgd": 0,
    "adamw_torch_4bit": 1,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adamw_torch_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "paged_adamw_32bit": 8,
}


@dataclass(frozen=True)
class ModelSizes:
    """What memory depends on in a model; parameters are numbers, not bytes.

    stored:        bytes of all parameters and buffers
    trained:       parameters that are trained, and `trained_bytes` of them
    cast:          float32 parameters of linear layers, which autocast copies
    layers:        decoder layers
    in_layer:      parameters of the largest one, and `trained_in_layer` of them
    outside:       parameters outside of the layers, embeddings and head, and `trained_outside` of them
    hidden:        D
    queries:       width of all query heads of a layer, and `keys`, `values` of all key and value heads
    intermediate:  width of a token's path through an MLP; of a mixture of experts through those that it takes
    vocabulary:    V
    full:          bytes of a number of the residual stream: of the weights of norms
    head_trained:  whether the head has a gradient
    """

    stored: int
    trained: int
    trained_bytes: int
    cast: int
    layers: int
    in_layer: int
    trained_in_layer: int
    outside: int
    trained_outside: int
    hidden: int
    queries: int
    keys: int
    values: int
    intermediate: int
    vocabulary: int
    full: int
    head_trained: bool

    @classmethod
    def of(cls, model: nn.Module) -> ModelSizes:
        """Of a transformers causal language model, also one on the meta device or wrapped by PEFT.

        Raises StepDPOError for one whose layers or whose configuration's sizes do not have the names of Llama's.
        """
        lm = causal_lm(model)
        config: Any = lm.config
        if not hasattr(lm.base_model, "layers") or not hasattr(config, "intermediate_size"):
            raise StepDPOError(f"model {type(lm).__name__}: its sizes do not have the names that Llama's have")
        layers = lm.base_model.layers
        widest = max(layers, key=_count)
        tensors = [*model.parameters(), *model.buffers()]
        head = lm.get_output_embeddings().weight
        inside = [sum(map(_count, layers)), sum(_count(layer, trained=True) for layer in layers)]
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        query_size, value_size = (
            getattr(config, "qk_head_dim", None) or size,
            getattr(config, "v_head_dim", None) or size,
        )
        norms = [p for p in widest.parameters() if p.ndim == 1 and p.is_floating_point()]
        linears = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        return cls(
            stored=sum(t.numel() * t.element_size() for t in tensors),
            trained=_count(model, trained=True),
            trained_bytes=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
            cast=sum(w.numel() for w in linears.values() if w.dtype == torch.float32),
            layers=len(layers),
            in_layer=_count(widest),
            trained_in_layer=_count(widest, trained=True),
            outside=_count(model) - inside[0],
            trained_outside=_count(model, trained=True) - inside[1],
            hidden=config.hidden_size,
            queries=heads * query_size,
            keys=groups * query_size,
            values=groups * value_size,
            intermediate=_intermediate(config),
            vocabulary=head.shape[0],
            full=norms[0].element_size() if norms else lm.dtype.itemsize,
            head_trained=head.requires_grad,
        )


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _intermediate(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return int(config.intermediate_size)
    each = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or each * (
        getattr(config, "n_shared_experts", None) or 0
    )
    return int(experts * each + shared)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for each process, by what they are for; `print` shows them in GiB."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int
    reference: int = 0  # a second model, asked in every step

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / 2**30:.2f}" for f in fields(self))
        return f"{self.total / 2**30:.2f} GiB: {parts}"


def plan_memory(
    sizes: ModelSizes,
    *,
    max_tokens: int,
    max_rows: int,
    max_keys: int = 0,
    world_size: int = 1,
    sharding: str = "none",
    compute: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw_torch_fused",
    checkpointing: bool = False,
) -> MemoryPlan:
    """Peak memory of a process in the second optimiser step or later, when the optimiser has its state.

    Args:
        sizes: of the model, as it is loaded.
        max_tokens: T of the largest forward pass.
        max_rows: R of the largest.
        max_keys: K of the largest where attention gathers keys and values for each leaf, else 0.
        world_size: processes, W.
        sharding: "none" (one process), "ddp", "fsdp" (FSDP2 with parameters gathered in `compute` and resharded after
            each layer) or "zero3" (bf16).
        compute: dtype of products: float32, or bfloat16 or float16 (under autocast where weights are float32).
        optimizer: as `TrainingArguments.optim`.
        checkpointing: gradient checkpointing of every layer.

    Raises ValueError for another `sharding`, and for more than one process under "none".
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {sharding!r}")
    if sharding == "none" and world_size != 1:
        raise ValueError(f"{world_size} processes need sharding='ddp', 'fsdp' or 'zero3'")
    sharded = sharding in ("fsdp", "zero3")
    width = compute.itemsize
    weights, gradients = sizes.stored, sizes.trained_bytes
    states = _states(optimizer, sizes)
    if sharding == "zero3":
        weights -= max(0, sizes.trained_bytes - width * sizes.trained)  # held in `compute`
        gradients = width * sizes.trained
        states += 4 * sizes.trained if width < 4 else 0
    if sharded:
        moved = 2 * sizes.in_layer + sizes.outside
        unscattered = max(sizes.trained_in_layer, sizes.trained_outside)
        gathered = width * (moved + sizes.trained_in_layer + sizes.trained_outside) + 4 * unscattered
    else:
        gathered = (width * sizes.cast if width < 4 else 0) + (gradients if sharding == "ddp" else 0)
    share = world_size if sharded else 1
    return MemoryPlan(
        weights=weights // share,
        gradients=gradients // share,
        optimizer=states // share,
        gathered=gathered,
        activations=_activations(sizes, max_tokens, max_keys, width, width if sharded else sizes.full, checkpointing),
        head=_head(sizes, max_rows, width, sharded),
    )


def _states(optimizer: str, sizes: ModelSizes) -> int:
    if optimizer in _STATES:
        return _STATES[optimizer] * sizes.trained
    return 2 * sizes.trained_bytes


def _activations(sizes: ModelSizes, tokens: int, keys: int, width: int, full: int, checkpointing: bool) -> int:
    """Saved from forward to backward: by every layer, or with checkpointing one layer and every layer's input.

    width: bytes of a number in products; full: of one in the residual stream, which is cast for each linear layer
    """
    linears = 5 * width if full != width else 2 * width  # inputs of q, k, v, gate, up; or of both norms' outputs
    norms = 2 * (4 + full)  # each its input in float32 and what its weight multiplies
    attention = width * (2 * sizes.queries + sizes.keys + sizes.values)  # q, k, v and the output
    mlp = 4 * width * sizes.intermediate  # gate, up, the activation of gate, and the product of both
    layer = tokens * ((norms + linears) * sizes.hidden + attention + mlp) + keys * width * (sizes.keys + sizes.values)
    backward = tokens * width * 3 * sizes.intermediate  # gradients of gate, up and product
    stream = tokens * sizes.hidden * full
    saved = layer + sizes.layers * stream if checkpointing else sizes.layers * layer
    return saved + backward + 2 * stream


def _head(sizes: ModelSizes, rows: int, width: int, sharded: bool) -> int:
    logits = 4 * min(rows, CHUNK_ROWS) * sizes.vocabulary
    sums = 4 * rows * sizes.hidden
    if not sizes.head_trained:
        return logits + logits // 2 + sums  # and what becomes of them, in bfloat16
    most = max(2 * sizes.hidden, 4 * CHUNK_ROWS)
    kept = 2 * min(rows, most) * sizes.vocabulary
    # Then gradients are taken in forward, group by group, into a float32 sum.
    if 4 * rows > 5 * most and most * sizes.vocabulary * sizes.hidden >= LEAST_WORK:
        kept += 4 * sizes.vocabulary * sizes.hidden
    # The head's gradient beside the sum so far; under FSDP and ZeRO-3 it is among what is gathered.
    gradient = 0 if sharded else (width + (sizes.full if sizes.full != width else 0)) * sizes.vocabulary * sizes.hidden
    return logits + sums + kept + gradient
