"""`StepDPOConfig`: transformers' TrainingArguments with the paper's defaults and what Step-DPO adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from stepdpo_kernels.loss import LOSS_TYPES, StepDPOLoss
from stepdpo_kernels.model import require_transformers
from stepdpo_kernels.packing import SHARE_MODES
from stepdpo_kernels.types import StepDPOError

require_transformers("5.17", "StepDPOTrainer")  # here, before another module asks an older one for what it lacks

REFERENCES = ("precomputed", "adapter_off", "model", "none")
ORDERS = ("random", "grouped", "sequential")
ON_NONFINITE = ("stop", "skip")


PAIRS_PER_STEP = 128  # of the released scripts, over all processes


def asked_of_accelerate(mode: str) -> bool:
    """Whether `accelerate launch` was told to use "FSDP", "DEEPSPEED" or "MEGATRON_LM"."""
    return parse_flag_from_env(f"ACCELERATE_USE_{mode}")


@dataclass
class StepDPOConfig(TrainingArguments):
    """Arguments of StepDPOTrainer: every field of `transformers.TrainingArguments`, and the ones below.

    The defaults are those of the released Step-DPO training scripts for the 72B model (Lai et al. 2024): beta 0.4,
    128 pairs an optimiser step, 4 epochs, learning rate 5e-7 with cosine decay after 10% of warm-up, sequences of at
    most 1,024 tokens.

    An optimiser step takes `pairs_per_step` pairs over all processes, or the product of per_device_train_batch_size,
    gradient_accumulation_steps and the number of processes where one of these is given instead. How they are split
    into forward passes is decided by `max_tokens_per_batch` and does not change the gradient; afterwards
    per_device_train_batch_size is the number of pairs a process takes for a step, and gradient_accumulation_steps is 1.

    Raises StepDPOError for a value outside its range, by field.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1 a share of all steps."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Passes over the pairs."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "With gradient_accumulation_steps: pairs an optimiser step, see pairs_per_step."},
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "With per_device_train_batch_size: pairs an optimiser step, see pairs_per_step."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16. Unless given: on CUDA devices that have it."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pairs packed together in evaluation."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimiser steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses in logs."})
    save_steps: float = field(default=100, metadata={"help": "Save a checkpoint every so many optimiser steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: pairs have no columns."})
    # None first: HfArgumentParser takes a union for what stands last in it.
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where to report metrics."})

    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the pairs in an epoch: random; grouped (problems in random order, so that a step shares "
            "more and has fewer problems, which changes training); or sequential."
        },
    )

    beta: float = field(default=0.4, metadata={"help": "Strength of the pull towards the reference."})
    # HfArgumentParser takes the list of this union, and of lists only a default_factory. One type becomes a string.
    loss_type: str | list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"Pair loss, or several that are added up: {', '.join(LOSS_TYPES)}."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss_type, >= 0. 1 unless given."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability that a preference is the wrong way round, in [0, 0.5); robust needs it."},
    )
    rpo_alpha: float = field(
        default=0.0, metadata={"help": "Weight of an added NLL of the chosen step, per token (RPO); 0 leaves it out."}
    )
    simpo_gamma: float | None = field(
        default=None, metadata={"help": "Target margin of loss_type simpo, in units of reward. 0.5 unless given."}
    )
    pairs_per_step: int | None = field(
        default=None, metadata={"help": "Pairs of one optimiser step, over all processes. 128 unless given."}
    )
    max_tokens_per_batch: int = field(
        default=8192, metadata={"help": "Token budget of one forward pass; shared tokens count once."}
    )
    max_keys_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Second budget of one forward pass, for attention that gathers keys (flash, varlen): tokens on all "
            "root-to-leaf paths. By default there is none."
        },
    )
    share: str = field(
        default="tree", metadata={"help": "Which prefixes are encoded once: tree (all), pair (of a pair), none."}
    )
    verify_first_batch: bool | None = field(
        default=None,
        metadata={
            "help": "Compare a few pairs of the first batch, packed and branch by branch, before training. Unless "
            "given: for architectures that the package's tests do not cover."
        },
    )
    reference: str = field(
        default="precomputed",
        metadata={
            "help": "Reference log-probs: precomputed (once, cached on disk); in every step from the model without its "
            "PEFT adapter (adapter_off) or from a frozen second model (model); none (reference-free; simpo and sft "
            "always)."
        },
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "Where reference log-probs are cached. Default: the user's cache folder."}
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "Where a loss or gradient is not finite, beside naming the pairs: stop, before the weights change, "
            "or skip the optimiser step."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1:
            self.loss_type = self.loss_type[0]
        for name, choices in (
            ("share", SHARE_MODES),
            ("reference", REFERENCES),
            ("train_sampling_strategy", ORDERS),
            ("on_nonfinite", ON_NONFINITE),
        ):
            if getattr(self, name) not in choices:
                raise StepDPOError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        try:
            loss = self.build_loss()
        except ValueError as error:
            raise StepDPOError(str(error)) from None
        if loss.reference_free:
            self.reference = "none"
        for name in ("max_tokens_per_batch", "max_keys_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StepDPOError(f"{name} must be at least 1, got {value}")
        if self.remove_unused_columns:
            raise StepDPOError("remove_unused_columns must be False: step pairs have no columns")
        # Trainer asks for use_cpu before it takes bf16 there; without an accelerator there is nothing else to mean. But
        # accelerate would then leave DeepSpeed aside, which has its own way of finding devices.
        if not torch.accelerator.is_available() and not (self.deepspeed or asked_of_accelerate("DEEPSPEED")):
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        asked = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        self.per_device_train_batch_size, self.gradient_accumulation_steps = (1 if n is None else n for n in asked)
        super().__post_init__()
        if self.device.type != "cuda":
            self.dataloader_pin_memory = False
        if self.pairs_per_step is None:
            product = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.pairs_per_step = PAIRS_PER_STEP if asked == (None, None) else product
        if self.pairs_per_step < 1 or self.pairs_per_step % self.world_size:
            raise StepDPOError(
                f"pairs_per_step must be a positive multiple of the {self.world_size} processes, "
                f"got {self.pairs_per_step}"
            )
        self.per_device_train_batch_size = self.pairs_per_step // self.world_size
        self.gradient_accumulation_steps = 1

    def build_loss(self, **head_options: Any) -> StepDPOLoss:
        """The loss that these arguments describe, of a model with these `head_options`.

        Raises ValueError for a value outside its range.
        """
        return StepDPOLoss(
            beta=self.beta,
            loss_type=self.loss_type,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            reference_free=self.reference == "none",
            rpo_alpha=self.rpo_alpha,
            simpo_gamma=self.simpo_gamma,
            **head_options,
        )
