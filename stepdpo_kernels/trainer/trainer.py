"""`StepDPOTrainer`: transformers' Trainer on packed step pairs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from stepdpo_kernels.data import check_vocabulary
from stepdpo_kernels.loss import StepDPOLoss, StepDPOOutput
from stepdpo_kernels.model import causal_lm, check_supported, enable_packed_forward
from stepdpo_kernels.packing import tokens_of_pair
from stepdpo_kernels.trainer.collate import IndexedPairs, StepCollator
from stepdpo_kernels.trainer.config import StepDPOConfig
from stepdpo_kernels.trainer.loading import load_model
from stepdpo_kernels.trainer.meter import Meter
from stepdpo_kernels.trainer.reference import cache_key, compute_ref_logps, load_or_compute
from stepdpo_kernels.trainer.run_folder import check_output_dir, read_run_file, staged, write_run_file
from stepdpo_kernels.types import PackedBatch, StepDPOError, StepPair

logger = logging.getLogger("stepdpo_kernels")

# Modes of accelerate in which an uneven number of forward passes would hang a collective.
_REFUSED_MODES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")


class StepDPOTrainer(Trainer):
    """Trains a causal language model on step pairs (Lai et al. 2024).

    Everything but the batch is transformers' Trainer: optimiser, schedule, precision, logging, checkpoints,
    callbacks. One item of its dataloader is a whole optimiser step, packed into as few forward passes as the token
    budget allows; the loss is the mean over the step's pairs, so the gradient does not depend on the split.

    Args:
        model: a transformers causal language model, a PEFT model, or a path or hub id, loaded in float32.
        args: StepDPOConfig.
        train_dataset: a sequence of StepPair, for example what `load_step_pairs` gives.
        processing_class: the tokenizer, saved beside the model; its vocabulary must fit the model's.
        ref_model: the frozen reference. None: the model as it is at the start (without its adapter, for PEFT).
        peft_config: a peft configuration to wrap the model with.
        eval_dataset: a sequence of StepPair to evaluate on.
        **trainer_options: further arguments of `transformers.Trainer`, such as callbacks or optimizers.

    Logged, as means over the pairs since the last log: loss, rewards/chosen, rewards/rejected, rewards/margins,
    rewards/accuracies, logps/chosen, logps/rejected (nats), tokens/saved (share of the tokens that unshared branches
    would take), tokens/batch (encoded a forward pass), pairs_per_second, and Trainer's own.

    Raises StepDPOError, before anything is written, for a model that cannot be packed, a pair over the token budget or
    with tokens that the model lacks, an empty dataset, and an unsupported way of distributing.
    """

    args: StepDPOConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: StepDPOConfig | None = None,
        train_dataset: Sequence[StepPair] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | nn.Module | None = None,
        peft_config: Any = None,
        eval_dataset: Sequence[StepPair] | None = None,
        **trainer_options: Any,
    ) -> None:
        if args is None:
            args = StepDPOConfig(output_dir="stepdpo_output")
        if not isinstance(args, StepDPOConfig):
            raise StepDPOError(f"args must be a StepDPOConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise StepDPOError(
                f"{args.n_gpu} GPUs are visible to one process: start one process each with torchrun or accelerate "
                "launch, or choose one with CUDA_VISIBLE_DEVICES"
            )
        if isinstance(model, str):
            model = load_model(model)
        check_supported(model)
        _check_tokenizer(model, processing_class)
        for name, pairs in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if pairs is not None:
                _check_pairs(pairs, name, model, args)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        _check_head(model)
        _warn_of_lost_updates(model)
        enable_packed_forward(model)
        self.ref_model = ref_model
        self.loss = StepDPOLoss(
            beta=args.beta,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing,
            reference_free=args.reference == "none",
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=StepCollator(args.max_tokens_per_batch, args.share),
            train_dataset=None if train_dataset is None else IndexedPairs(train_dataset),
            eval_dataset=None if eval_dataset is None else IndexedPairs(eval_dataset),
            processing_class=processing_class,
            **trainer_options,
        )
        mode = self.accelerator.distributed_type.value
        if mode in _REFUSED_MODES:
            raise StepDPOError(f"training under {mode} is not supported: use DistributedDataParallel (torchrun)")
        self._meter = Meter()
        self._staging: Path | None = None
        self._reference_keys: dict[str, dict[str, str]] = {}
        self._references_ready = False

    # ---- reference log-probs ------------------------------------------------------------------------------------

    def _prepare_references(self) -> None:
        """Fills in the reference log-probs of both datasets, once, while the policy is still the reference."""
        if self._references_ready or self.loss.reference_free:
            return
        if self.train_dataset is not None:
            self._fill_ref_logps("train", self.train_dataset, self.get_train_dataloader)
        if self.eval_dataset is not None:
            self._fill_ref_logps("eval", self.eval_dataset, self.get_eval_dataloader)
        self._references_ready = True

    def _fill_ref_logps(self, name: str, dataset: IndexedPairs, dataloader: Callable[[], DataLoader[Any]]) -> None:
        """Reference log-probs of a dataset, in the forests in which its dataloader first gives its pairs."""
        args = self.args
        model = self.model if self.ref_model is None else self.ref_model.to(args.device)
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        drawn = {
            "seed": args.seed,
            "data_seed": args.data_seed,
            "pairs_per_step": args.pairs_per_step,
            "world": args.world_size,
        }
        packing = {"max_tokens": args.max_tokens_per_batch, "share": args.share}
        key = cache_key(model, dataset.pairs, name=name, autocast=autocast, device=args.device.type, **packing, **drawn)
        self._reference_keys[name] = key

        def table_of(steps: Iterable[list[PackedBatch]]) -> Tensor:
            progress = not args.disable_tqdm and self.is_world_process_zero()
            return compute_ref_logps(
                model, len(dataset), steps, self.loss, self.accelerator, autocast_dtype=autocast, progress=progress
            )

        def compute() -> Tensor:
            without_adapter = getattr(model, "disable_adapter", nullcontext)  # of a PEFT model
            # The order of training must be the same whether this pass ran or a cache was read.
            with without_adapter(), torch.random.fork_rng():
                table = table_of(dataloader())
                left = table.isnan().any(dim=1)  # pairs that dataloader_drop_last keeps out of the first epoch
                if left.any():
                    step = self.data_collator([dataset[i] for i in left.nonzero()[:, 0].tolist()])
                    table[left] = table_of([[batch.to(args.device) for batch in step]])[left]
            return table

        dataset.ref_logps = load_or_compute(args.reference_cache_dir, key, compute).to(args.device)

    # ---- training -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, after the reference log-probs are there.

        Raises StepDPOError when output_dir holds another run, or when a resumed run began with another reference,
        other pairs or other packing.
        """
        if self.train_dataset is None:
            raise StepDPOError("train_dataset is missing")
        resume_from_checkpoint = resume_from_checkpoint or None
        check_output_dir(self.args.output_dir, resuming=resume_from_checkpoint is not None)
        self._prepare_references()
        if resume_from_checkpoint is not None:
            began_with = read_run_file(self.args.output_dir).get("reference", self._reference_keys)
            changed = _differences(began_with, self._reference_keys)
            if changed:
                raise StepDPOError(f"output_dir {self.args.output_dir!r}: the run began with another {changed}")
        elif self.is_world_process_zero():
            description = {
                "config": self.args.to_sanitized_dict(),
                "reference": self._reference_keys,
                "pairs": len(self.train_dataset),
            }
            write_run_file(self.args.output_dir, description)
        self._meter = Meter()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: list[PackedBatch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of all micro-batches of one optimiser step; returns its loss on this process."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._meter.start()
        num_pairs = self._pairs_per_process(inputs)
        total = torch.zeros((), device=self.args.device)
        for i, batch in enumerate(inputs):
            is_last = i == len(inputs) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    output = self._packed_loss(model, batch, self.train_dataset, num_pairs)
                self.accelerator.backward(output.loss)
            total += output.loss.detach()
            self._meter.add(batch, output)
        return total

    def _pairs_per_process(self, inputs: list[PackedBatch]) -> float:
        """Pairs of this optimiser step over all processes, divided by the processes that average their gradients."""
        pairs = sum(batch.num_pairs for batch in inputs)
        if self.args.world_size == 1:
            return pairs
        total = self.accelerator.reduce(torch.tensor(float(pairs), device=self.args.device), reduction="sum")
        return float(total) / self.args.world_size

    def _packed_loss(
        self, model: nn.Module, batch: PackedBatch, dataset: IndexedPairs, num_pairs: float
    ) -> StepDPOOutput:
        ref_logps = None if dataset.ref_logps is None else dataset.ref_logps[batch.pair_index].T.reshape(-1)  # (2P,)

        def head(hidden: Tensor, lm_head: nn.Linear) -> StepDPOOutput:
            return self.loss.packed(hidden, lm_head.weight, batch, ref_logps, bias=lm_head.bias, num_pairs=num_pairs)

        return model(packed_batch=batch, head=head)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meter.drain(self.accelerator))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 FLOPs for each parameter and encoded token, as is usual for forward and backward."""
        return 6 * sum(batch.num_tokens for batch in inputs) * causal_lm(self.model).num_parameters()

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Sequence[StepPair] | IndexedPairs | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics, prefixed, on eval_dataset or on the one given at the start.

        Raises StepDPOError for another dataset once the policy has moved on, unless there is a ref_model.
        """
        self._prepare_references()
        if eval_dataset is not None and not isinstance(eval_dataset, IndexedPairs):
            _check_pairs(eval_dataset, "eval_dataset", self.model, self.args)
            eval_dataset = IndexedPairs(eval_dataset)
            if not self.loss.reference_free:
                if self.ref_model is None and self.state.global_step > 0:
                    raise StepDPOError("eval_dataset: give it to StepDPOTrainer at the start, or pass a ref_model")
                self._fill_ref_logps("eval", eval_dataset, partial(self.get_eval_dataloader, eval_dataset))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        model = (
            self.model_wrapped if self.is_in_train else self.accelerator.prepare_model(self.model, evaluation_mode=True)
        )
        model.eval()
        meter = Meter()
        meter.start()
        for batch in chain.from_iterable(dataloader):
            with self.compute_loss_context_manager():
                meter.add(batch, self._packed_loss(model, batch, dataloader.dataset, num_pairs=1))  # type: ignore[arg-type]
        means = meter.drain(self.accelerator, losses_are_sums=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(dataloader.dataset),  # type: ignore[arg-type]
        )

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves beside the checkpoints and renames, so that a checkpoint is whole or absent."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with staged(run_dir) as folder:
            self._staging = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(folder / name):
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(folder / name / "trainer_state.json"))
            if self.args.should_save:
                os.replace(folder / name, run_dir / name)
                rotate_checkpoints(
                    output_dir=str(run_dir),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
            self.accelerator.wait_for_everyone()


def _check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    vocabulary = causal_lm(model).get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise StepDPOError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {vocabulary}: they do not belong together, "
            "or the model's embeddings must be resized first"
        )


def _check_pairs(pairs: Sequence[StepPair], name: str, model: nn.Module, args: StepDPOConfig) -> None:
    if len(pairs) == 0:
        raise StepDPOError(f"{name} holds no pairs")
    check_vocabulary(pairs, causal_lm(model).get_input_embeddings().num_embeddings)
    share = "none" if args.share == "none" else "pair"
    for pair in pairs:
        tokens = tokens_of_pair(pair, share)
        if tokens > args.max_tokens_per_batch:
            raise StepDPOError(
                f"{name}: pair {pair.id!r} takes {tokens} tokens, more than max_tokens_per_batch="
                f"{args.max_tokens_per_batch}: raise it, or leave the pair out (load_step_pairs(..., max_tokens=...))"
            )


def _check_head(model: nn.Module) -> None:
    head = causal_lm(model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise StepDPOError(
            f"the language-model head is a {type(head).__name__}, whose adapter the loss would leave out: "
            "take lm_head out of the peft configuration's target_modules and modules_to_save"
        )


def _warn_of_lost_updates(model: nn.Module) -> None:
    """Adam moves a weight by about the learning rate; bfloat16 keeps 8 bits of it, so small moves round to nothing."""
    low = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        logger.warning(
            "%d of the trained parameters are %s, where updates smaller than about 1/256 of a weight are lost: load "
            "the model in float32 and set bf16=True for bfloat16 compute",
            len(low),
            low[0].dtype,
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which parts of the reference keys differ, as words; empty if none."""
    parts = [
        f"{part} ({name})"
        for name in now
        for part in now[name]
        if before.get(name, {}).get(part) != now[name][part] and part in ("model", "pairs", "settings")
    ]
    return ", ".join(parts)
