"""What StepDPOTrainer refuses before anything is written, each with its own message."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames, ParallelMode

from stepdpo_kernels.data import check_vocabulary
from stepdpo_kernels.model import causal_lm, head_options, max_path
from stepdpo_kernels.packing import size_of_pair
from stepdpo_kernels.trainer.config import StepDPOConfig, asked_of_accelerate
from stepdpo_kernels.trainer.sharding import zero_stage
from stepdpo_kernels.types import StepDPOError, StepPair

logger = logging.getLogger("stepdpo_kernels")


def check_distribution(args: StepDPOConfig) -> None:
    """Raises StepDPOError for the ways of distributing that are not supported."""
    if args.n_gpu > 1:
        raise StepDPOError(
            f"{args.n_gpu} GPUs are visible to one process: start one process each with torchrun or accelerate "
            "launch, or choose one with CUDA_VISIBLE_DEVICES"
        )
    fsdp = args.fsdp_config or {}
    by_launch = asked_of_accelerate("FSDP") and not args.fsdp
    if fsdp.get("xla"):
        refuse_mode("XLA")
    if str(fsdp.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1") if by_launch else 2) != "2":
        refuse_mode("FSDP1")
    deepspeed = args.deepspeed or asked_of_accelerate("DEEPSPEED")
    if deepspeed and args.distributed_state.distributed_type != DistributedType.DEEPSPEED:
        raise StepDPOError(
            "deepspeed shards over processes with a GPU each: start them with torchrun or accelerate launch (on CPUs, "
            "take FSDP2)"
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise StepDPOError("fsdp shards over processes: start them with torchrun or accelerate launch")
    if asked_of_accelerate("MEGATRON_LM"):
        refuse_mode("Megatron-LM")
    if args.on_nonfinite == "skip" and deepspeed:
        raise StepDPOError("on_nonfinite='skip': DeepSpeed takes its step within the backward pass; leave it at 'stop'")
    if args.fp16 and (args.fsdp or by_launch or deepspeed):
        raise StepDPOError("fp16 with sharded weights is not supported: use bf16")


def check_accelerator(accelerator: Accelerator, model: nn.Module) -> None:
    """Raises StepDPOError for ways of distributing that show only once accelerate and Trainer have settled on one."""
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
        refuse_mode("FSDP1")
    if accelerator.distributed_type in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        refuse_mode(accelerator.distributed_type.value)
    plan = accelerator.parallelism_config
    if plan is not None and (plan.tp_enabled or plan.cp_enabled or plan.sp_enabled):
        refuse_mode("tensor, context or sequence parallelism")
    if getattr(causal_lm(model), "is_distributed_loading_by_transformers", False):
        refuse_mode("a model that from_pretrained has distributed")
    if accelerator.distributed_type == DistributedType.DEEPSPEED and zero_stage(accelerator) == 3:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise StepDPOError(
                "deepspeed: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true, without which "
                "the trained model is not saved as one that transformers loads"
            )


# Options of Trainer that this trainer would ignore, or that replace the forward it has put on the model.
_REFUSED_SETTINGS = (
    "neftune_noise_alpha",
    "auto_find_batch_size",
    "bf16_full_eval",
    "fp16_full_eval",
    "label_smoothing_factor",
    "torch_empty_cache_steps",
    "batch_eval_metrics",
    "include_for_metrics",
    "prediction_loss_only",
)
_REFUSED_ARGUMENTS = ("compute_loss_func", "preprocess_logits_for_metrics", "data_collator")


def check_options(args: StepDPOConfig, trainer_options: dict[str, Any]) -> None:
    """Raises StepDPOError for options of transformers' Trainer that do not work here, by name."""
    refused = [name for name in _REFUSED_SETTINGS if getattr(args, name, None)]
    refused += ["include_num_input_tokens_seen"] * (args.include_num_input_tokens_seen != "no")
    refused += ["dataloader_in_order"] * (not getattr(args, "dataloader_in_order", True))
    if args.optim in ("lomo", "adalomo"):  # which update within each backward pass
        refused.append(f"optim={OptimizerNames(args.optim).value}")
    refused += [name for name in _REFUSED_ARGUMENTS if trainer_options.get(name) is not None]
    if refused:
        raise StepDPOError(f"{', '.join(refused)}: not supported by StepDPOTrainer; leave it out")


def refuse_mode(mode: str) -> None:
    raise StepDPOError(
        f"training under {mode} is not supported: use DistributedDataParallel (torchrun), FSDP2 (fsdp_version: 2) or "
        "DeepSpeed's ZeRO"
    )


def check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises StepDPOError for a tokenizer with more tokens than the model."""
    vocabulary = causal_lm(model).get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise StepDPOError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {vocabulary}: they do not belong together, "
            "or the model's embeddings must be resized first"
        )


def check_pairs(pairs: Sequence[StepPair], name: str, model: nn.Module, args: StepDPOConfig) -> None:
    """Raises StepDPOError for what is not a sequence of pairs, or holds none, and for a pair that cannot be packed."""
    if not (hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")):
        raise StepDPOError(f"{name} must be a sequence of StepPair, got {type(pairs).__name__}")
    if len(pairs) == 0:
        raise StepDPOError(f"{name} holds no pairs")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, StepPair):
            raise StepDPOError(
                f"{name} must be a sequence of StepPair, but its item {number} is a {type(pair).__name__}: "
                "load_step_pairs makes pairs of records"
            )
    check_vocabulary(pairs, causal_lm(model).get_input_embeddings().num_embeddings)
    share = "none" if args.share == "none" else "pair"
    longest = max_path(causal_lm(model).config)
    for pair in pairs:
        length = pair.prefix_ids.size + max(pair.chosen_ids.size, pair.rejected_ids.size) - 1  # the last is not encoded
        if longest is not None and length > longest:
            raise StepDPOError(
                f"{name}: pair {pair.id!r} has a branch of {length} encoded tokens, and the model's rotary embedding "
                f"depends on the longest text of a batch beyond {longest}: leave the pair out "
                "(load_step_pairs(..., max_tokens=...))"
            )
        for what, size, budget in zip(
            ("tokens", "keys"),
            size_of_pair(pair, share),
            (args.max_tokens_per_batch, args.max_keys_per_batch),
            strict=True,
        ):
            if budget is not None and size > budget:
                raise StepDPOError(
                    f"{name}: pair {pair.id!r} takes {size} {what}, more than max_{what}_per_batch={budget}: raise it, "
                    "or leave the pair out (load_step_pairs(..., max_tokens=...))"
                )


def check_reference(model: nn.Module, ref_model: nn.Module | None, args: StepDPOConfig) -> None:
    """Raises StepDPOError for a reference that is not there, that nobody would ask, or with other logits."""
    has_adapter = hasattr(model, "disable_adapter")
    if args.reference == "adapter_off" and not has_adapter:
        raise StepDPOError("reference='adapter_off' needs an adapter: pass a peft_config, or take 'precomputed'")
    if args.reference == "model" and ref_model is None and has_adapter:
        raise StepDPOError(
            "reference='model' needs a ref_model where the model has an adapter; 'adapter_off' takes no second model"
        )
    if ref_model is None:
        return
    if args.reference == "none":
        raise StepDPOError("ref_model: this loss has no reference (reference='none', simpo, sft); leave it out")
    if args.reference == "adapter_off":
        raise StepDPOError("ref_model: with reference='adapter_off' nobody would ask it; leave it out")
    if causal_lm(ref_model) is causal_lm(model) and args.reference == "model":
        raise StepDPOError("ref_model: it is the model itself, which is about to change; leave it out for a copy")
    if head_options(ref_model) != head_options(model):
        raise StepDPOError(
            f"ref_model: its logits are transformed by {head_options(ref_model)}, those of the model by "
            f"{head_options(model)}: they are not of one family"
        )


def check_adapter(model: nn.Module) -> None:
    """Raises StepDPOError for an adapter that would not be saved; what cannot be packed `check_supported` refuses."""
    lm = causal_lm(model)
    if lm is model and getattr(lm, "_hf_peft_config_loaded", False):
        raise StepDPOError(
            "model: an adapter was loaded into the model itself, and saving it would lose what is trained beside the "
            "adapter: load it with peft.PeftModel.from_pretrained(..., is_trainable=True), or merge it first"
        )


def keep_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on the CPU.

    It does so in the first evaluation, for inference, and what is repacked gives no gradient to its input afterwards.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def warn_of_lost_updates(model: nn.Module) -> None:
    """Adam moves a weight by about the learning rate; bfloat16 keeps 8 bits of it, so small moves round to nothing."""
    low = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        logger.warning(
            "%d of the trained parameters are %s, where updates smaller than about 1/256 of a weight are lost: load "
            "the model in float32 and set bf16=True for bfloat16 compute",
            len(low),
            low[0].dtype,
        )
