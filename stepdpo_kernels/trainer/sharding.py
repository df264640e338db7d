"""Weights that are sharded over processes: FSDP2 and DeepSpeed, through accelerate.

A pass of a sharded model is collective: layer by layer, every process sends its part of the weights to the others. So
all processes must make the same number of passes, whatever their shares of a step need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stepdpo_kernels.model import causal_lm, verify_first_batch
from stepdpo_kernels.trainer.config import asked_of_accelerate
from stepdpo_kernels.types import PackedBatch


def shard_by_fsdp2(accelerator: Accelerator, plugin_args: dict[str, Any] | None) -> bool:
    """Prepares an accelerator for this package's forward under FSDP; whether it was asked for.

    plugin_args: of accelerate's FullyShardedDataParallelPlugin, by `TrainingArguments`; None: by `accelerate launch`

    On CPUs accelerate leaves its plugin aside, although torch shards there too. And its policy of mixed precision casts
    what a module returns, so that log-probs would lose bits; here they stay float32, and so do sums of gradients.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        if not asked_of_accelerate("FSDP"):  # by the command, or by its class that TrainingArguments makes
            return False
        plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        for state in (PartialState(), accelerator.state):  # the second takes over what the first says
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
    return plugin is not None


def runs_in_lockstep(accelerator: Accelerator) -> bool:
    """Whether all processes must make the same number of forward and backward passes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's: what it shards of optimiser (1), gradients (2) and weights (3)."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def same_for_all(accelerator: Accelerator, value: str) -> str:
    """The first process's where weights are sharded: with `cpu_ram_efficient_loading` it alone has read them so far."""
    return broadcast_object_list([value])[0] if runs_in_lockstep(accelerator) else value


def verify_before_sharding(model: nn.Module, batch: PackedBatch, accelerator: Accelerator) -> None:
    """`verify_first_batch` where it is due, on the first process: for a sharded model it would be too late."""
    lm: Any = causal_lm(model)
    if lm._verify_packing and accelerator.is_main_process:
        verify_first_batch(lm, batch.to(next(lm.parameters()).device))
    lm._verify_packing = False


def shard_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A frozen model of its own, sharded as the policy is going to be, and in the same types."""
    model.requires_grad_(False)
    if accelerator.distributed_type == DistributedType.FSDP:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    import deepspeed

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = {"stage": 3 if zero_stage(accelerator) == 3 else 0}
    frozen = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": settings.get("bf16", {})}
    engine, *_ = deepspeed.initialize(model=model, config=frozen)
    return engine


def equal_passes(
    steps: Iterable[list[PackedBatch]], accelerator: Accelerator, nothing: Callable[[], PackedBatch]
) -> Iterator[tuple[PackedBatch, bool]]:
    """All batches of the steps, and whether they count: where needed, processes with fewer run `nothing()` instead."""
    for batches in steps:
        missing = 0
        if runs_in_lockstep(accelerator):
            most = torch.tensor(len(batches), device=accelerator.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            missing = int(most) - len(batches)
        for batch in batches:
            yield batch, True
        for _ in range(missing):
            yield nothing(), False


def sharded_policy(model: nn.Module, accelerator: Accelerator) -> nn.Module | None:
    """What runs a model that accelerate has sharded; None before that."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        wrapper = accelerator.deepspeed_engine_wrapped
        return None if wrapper is None else wrapper.engine
    return model if isinstance(model, FSDPModule) else None


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Around all passes of an optimiser step but the last, whose gradients add up.

    DistributedDataParallel sums them over processes in the last pass, DeepSpeed must not take its step before it. FSDP2
    sums and shards them in every pass: whole ones would take as much memory as the whole model.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        with nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model):
            yield
        return
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


@contextmanager
def whole(tensor: Tensor) -> Iterator[Tensor]:
    """A parameter or buffer with all of its elements; collective where it is sharded, one tensor at a time."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    elif isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    else:
        yield tensor


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Where FSDP2 saves shards of each process, it saves one model that transformers loads."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    before = None if plugin is None else plugin.state_dict_type
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_state_dict_type(before)


def reshard(model: nn.Module) -> None:
    """Gives up what a forward pass without a backward pass left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
