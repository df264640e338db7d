"""TRL's DPOTrainer on packed forests: every prefix that a micro-batch has in common encoded once, and no logits.

    trainer = DPOTrainer(...)
    accelerate_dpo(trainer)
    trainer.train()

The collator adds the forest of its padded batch under one more key, which TRL hands on to the model; the model's
forward, asked for log-probs of a batch with a forest, runs its layers once over the forest, and puts the log-probs of
the completions where TRL expects them. Losses, references, adapters, metrics and checkpoints stay TRL's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import trl
from datasets import Dataset
from datasets.fingerprint import Hasher
from packaging.version import Version
from torch import Tensor
from transformers.utils import ModelOutput

from stepdpo_kernels.data import RawRecord, StepTokenizer, check_record, why_unfit
from stepdpo_kernels.data.records import FIELDS
from stepdpo_kernels.integrations.forest_forward import Accelerated, replace_forward
from stepdpo_kernels.integrations.token_logits import TokenLogits, answer_for_logits
from stepdpo_kernels.integrations.versions import require
from stepdpo_kernels.model import causal_lm, is_tested, padded_logps, verify_once
from stepdpo_kernels.packing import PaddedForest, pack_padded
from stepdpo_kernels.types import StepDPOError

logger = logging.getLogger("stepdpo_kernels")

VERSION = require("trl", "1.9", "1.17")
# TRL asks for log-probs by name (`fused_lm_head`) from 1.15 on, before that for logits.
ASKS_FOR_LOGITS = Version("1.15") > VERSION
KEY = "stepdpo_forest"
PACKED_FIELDS = ("input_ids", "attention_mask", "completion_mask")
OTHER_FIELDS = ("ref_chosen_logps", "ref_rejected_logps")
EXAMPLES_TO_VERIFY = 3


def accelerate_dpo(trainer: trl.DPOTrainer, *, share: str = "tree") -> Accelerated:
    """Lets a `trl.DPOTrainer` train on packed forests, until `remove()` of what is returned is called.

    Call it before `trainer.train()`. Loss types, reference models, adapters, metrics and checkpoints are TRL's as
    before; log-probs are ours, in float32. With `precompute_ref_log_probs=True` the constructor has computed the
    references already, TRL's way: take `StepDPOTRLTrainer` to have them computed on forests as well.

    Args:
        trainer: of TRL 1.9 to 1.16, text only.
        share: as in `pack_pairs`: "tree", "pair" or "none".

    Returns:
        Accelerated, which can also be used as a context manager. The one that there is, of an accelerated trainer.

    Raises:
        StepDPOError: a trainer, a model or an option that this cannot take, with every reason and what to do.
        ValueError: an unknown `share`.
    """
    if not isinstance(trainer, trl.DPOTrainer):
        raise StepDPOError(f"trainer: expected a trl.DPOTrainer, got {type(trainer).__name__}")
    if isinstance(trainer.data_collator, PackedCollator) and trainer.data_collator.owner is not None:
        return trainer.data_collator.owner
    reasons = why_not(trainer)
    if reasons:
        raise StepDPOError(f"this {type(trainer).__name__} cannot be accelerated: {'; '.join(reasons)}")
    collator = PackedCollator(trainer.data_collator, share, every_token=trainer.aux_loss_enabled)
    with Accelerated() as undo:
        policy: Any = causal_lm(trainer.model)
        undo.callback(replace_forward(trainer.model, _Forward(trainer, of_policy=True)))
        if not is_tested(policy):  # compared now, before its weights are sharded
            examples = list(islice(trainer.train_dataset, EXAMPLES_TO_VERIFY))
            verify_once(policy, collator(examples)[KEY].batch.to(policy.device))
        if trainer.ref_model is not None:
            reference: Any = causal_lm(trainer.ref_model)
            undo.callback(replace_forward(trainer.ref_model, _Forward(trainer, of_policy=False)))
            reference._verify_packing = False
        if ASKS_FOR_LOGITS:
            undo.enter_context(answer_for_logits())
        undo.callback(setattr, trainer, "data_collator", trainer.data_collator)
        trainer.data_collator = collator
        collator.owner = undo.pop_all()
    return collator.owner


def why_not(trainer: trl.DPOTrainer) -> list[str]:
    """Every reason, apart from its model, why a trainer cannot be accelerated."""
    args, reasons = trainer.args, []
    if getattr(trainer, "_is_vision_dataset", False):
        reasons.append("its dataset has images, and a forest is of text alone: train it with TRL as it is")
    if args.padding_free:
        reasons.append("padding_free is set, which TRL does not do and forests make needless: leave it out")
    if args.neftune_noise_alpha is not None:
        reasons.append("neftune_noise_alpha scales its noise by the padded length of a text: leave it out")
    if args.torch_compile:
        reasons.append("torch_compile would compile the forests' shapes one by one: leave it out")
    if args.accelerator_config.dispatch_batches:
        reasons.append("dispatch_batches cuts batches up after they are packed: set it to False")
    parallelism = trainer.accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            reasons.append(f"{name} is {size}, and a forest is not cut up or its head sharded: set it to 1")
    if ASKS_FOR_LOGITS:
        if args.use_liger_kernel:
            reasons.append(f"use_liger_kernel takes the place of the head in TRL {VERSION}: leave it out")
        if trainer.compute_metrics is not None:
            reasons.append(f"compute_metrics asks for logits in TRL {VERSION}: leave it out, or take TRL 1.15 or newer")
    return reasons


class PackedCollator:
    """A collator of padded pairs with the forest of its batch added."""

    owner: Accelerated | None = None

    def __init__(self, collator: Callable[..., Any], share: str, *, every_token: bool) -> None:
        self.collator, self.share, self.every_token = collator, share, every_token

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        padded = self.collator(examples)
        missing = set(PACKED_FIELDS) - padded.keys()
        if missing:
            raise StepDPOError(
                f"{type(self.collator).__name__} gave no {', '.join(sorted(missing))}: use TRL's "
                "DataCollatorForPreference or one that gives what it does"
            )
        foreign = padded.keys() - {*PACKED_FIELDS, *OTHER_FIELDS}
        if foreign:  # TRL hands it to the model
            raise StepDPOError(
                f"{type(self.collator).__name__} gave {', '.join(sorted(foreign))}, which packing would leave out: "
                "leave it out yourself, or train with TRL as it is"
            )
        tensors = (padded[name] for name in PACKED_FIELDS)
        padded[KEY] = pack_padded(*tensors, share=self.share, every_token=self.every_token)
        return padded

    def __getstate__(self) -> dict[str, Any]:  # for workers of the data loader that are spawned
        return vars(self) | {"owner": None}


@dataclass
class PackedOutput(ModelOutput):
    """What TRL reads of a model's output, each (2P, W-1) and 0 where no log-prob is wanted; see FusedCausalLMOutput."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    labels: Tensor | None = None
    aux_loss: Tensor | None = None

    @property
    def logits(self) -> TokenLogits:
        """For a TRL that asks for logits."""
        return TokenLogits(
            self.log_probs, self.entropy, self.log_sum_sq_probs, self.mean_logits, self.is_top1, self.labels
        )


class _Forward:
    """The forward of a model that takes batches with a forest, for `replace_forward`."""

    def __init__(self, trainer: trl.DPOTrainer, *, of_policy: bool) -> None:
        self.trainer, self.of_policy = trainer, of_policy

    def __call__(self, lm: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forest = kwargs.pop(KEY, None)
        if forest is None or not (ASKS_FOR_LOGITS or kwargs.get("fused_lm_head")):
            return plain(*args, **kwargs)
        return self.packed(lm, forest, **kwargs)

    def packed(
        self,
        lm: Any,
        forest: PaddedForest,
        input_ids: Tensor,  # (2P, W)
        attention_mask: Tensor,  # (2P, W)
        output_router_logits: bool = False,
        **_: Any,
    ) -> PackedOutput:
        # TRL evaluates in eval mode, and asks for references in train mode without gradients.
        statistics = self.of_policy and (torch.is_grad_enabled() or not lm.training)
        with self.trainer.accelerator.autocast():  # which a reference, prepared earlier, has around its old forward
            found = padded_logps(
                lm, forest.to(input_ids.device), statistics=statistics, router_logits=output_router_logits
            )
        known = {}
        if found.statistics is not None:
            known = dict(zip(("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), found.statistics, strict=True))
        if found.router_logits is not None:
            known["aux_loss"] = _load_balancing_loss(lm, found.router_logits, attention_mask)
        return PackedOutput(found.logps, label_mask=forest.mask, labels=input_ids[:, 1:], **known)


def _load_balancing_loss(lm: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
    """As the model's own forward computes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = lm.config.get_text_config()
    experts = getattr(lm, "num_experts", None) or config.num_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)


class StepDPOTRLTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer`, accelerated from the start, that also takes step pairs.

    Datasets with a column `initial_reason_steps` have the schema of Math-Step-DPO-10K: `prompt`,
    `initial_reason_steps`, `chosen`, `rejected`. Their steps come after the prompt and the steps before them as in
    `load_step_pairs`, without an end of turn or EOS, which TRL would put after them; a record that does not fit into
    `max_length`, has an empty step or two equal ones is left out with a warning. All other datasets are
    prepared by TRL. Reference log-probs that are precomputed are computed on forests, too.

    Args:
        share: as in `pack_pairs`.
        template, boundary: how step pairs are tokenised, as in `load_step_pairs`.
        others: of trl.DPOTrainer.

    Raises StepDPOError as `accelerate_dpo` and, for step pairs, as `load_step_pairs` do.
    """

    def __init__(
        self,
        *args: Any,
        share: str = "tree",
        template: str = "chat",
        boundary: str = "joint",
        **kwargs: Any,
    ) -> None:
        self._share, self._tokenization = share, {"template": template, "boundary": boundary}
        super().__init__(*args, **kwargs)
        self.accelerated = accelerate_dpo(self, share=share)

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        accelerate_dpo(self, share=self._share)
        if isinstance(dataset, Dataset):  # its cache: references that TRL computed its way are others
            dataset = copy(dataset)
            dataset._fingerprint = Hasher.hash((dataset._fingerprint, KEY))
        return super()._precompute_ref_logps(dataset, *args)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if "initial_reason_steps" not in next(iter(dataset)):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        tokenize = StepTokenizer(self._tokenizer, **self._tokenization)
        options = {"tokenize": tokenize, "max_length": args.max_length, "dataset_name": dataset_name}
        in_memory = isinstance(dataset, Dataset)  # what an IterableDataset has no options for
        tokenized = dataset.map(
            _tokenize,
            batched=True,
            with_indices=True,
            remove_columns=[*next(iter(dataset))],
            fn_kwargs=options,
            **({"num_proc": args.dataset_num_proc} if in_memory else {}),
        )
        again = {"load_from_cache_file": False} if in_memory else {}  # every run warns
        return tokenized.filter(_keep, input_columns="left_out", **again).remove_columns("left_out")


def _tokenize(
    rows: dict[str, list[Any]], numbers: list[int], tokenize: StepTokenizer, max_length: int | None, dataset_name: str
) -> dict[str, list[Any]]:
    """The columns of TRL's collator, and why a row is left out, if it is."""
    names = [name for name in FIELDS if name in rows]
    records = [
        check_record(
            RawRecord(f"row {number} of the {dataset_name} dataset", str(number), {n: rows[n][i] for n in names})
        )
        for i, number in enumerate(numbers)
    ]
    for record in records:
        if record.weight != 1.0:
            raise StepDPOError(
                f"{record.name}: field 'weight' is {record.weight:g}, and TRL weighs all pairs alike: leave it out, or "
                "take StepDPOTrainer"
            )
    tokens = tokenize(records)
    unfit = [why_unfit(record, found, "step", max_length) for record, found in zip(records, tokens, strict=True)]
    return {
        "prompt_ids": [found.prefix_ids for found in tokens],
        "chosen_ids": [found.chosen_ids for found in tokens],
        "rejected_ids": [found.rejected_ids for found in tokens],
        "left_out": [
            "" if reason is None else f"{record.name} is left out: {reason.problem}"
            for record, reason in zip(records, unfit, strict=True)
        ],
    }


def _keep(left_out: str) -> bool:
    if left_out:
        logger.warning("%s", left_out)
    return not left_out
