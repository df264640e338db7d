"""`StepDPOTrainer`: transformers' Trainer on packed step pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput

from stepdpo_kernels.loss import StepDPOOutput
from stepdpo_kernels.model import causal_lm, check_supported, enable_packed_forward, head_options
from stepdpo_kernels.model.verify import PAIRS
from stepdpo_kernels.trainer.acceleration import accelerate_layers
from stepdpo_kernels.trainer.card import CARD_FILE, write_card_of
from stepdpo_kernels.trainer.checks import (
    check_accelerator,
    check_adapter,
    check_distribution,
    check_options,
    check_pairs,
    check_reference,
    check_tokenizer,
    keep_layout,
    warn_of_lost_updates,
)
from stepdpo_kernels.trainer.collate import IndexedPairs, SetEpoch, StepCollator, step_loader, step_sampler
from stepdpo_kernels.trainer.config import StepDPOConfig
from stepdpo_kernels.trainer.loading import load_model
from stepdpo_kernels.trainer.meter import Meter
from stepdpo_kernels.trainer.nonfinite import Verdict, skips_on_device, unwrapped
from stepdpo_kernels.trainer.plan import TrainingPlan, plan_training
from stepdpo_kernels.trainer.progress import use_step_progress
from stepdpo_kernels.trainer.ref_logps import RefLogps
from stepdpo_kernels.trainer.reference import frozen, key_differences
from stepdpo_kernels.trainer.report import REPORT_FILE, write_report
from stepdpo_kernels.trainer.run_folder import (
    changed_settings,
    check_output_dir,
    check_writable,
    describe_run,
    explained,
    missing_parts,
    put_in_place,
    read_run_file,
    remove_unstarted_run,
    rotate,
    staged,
    to_standard_json,
    write_run_file,
)
from stepdpo_kernels.trainer.sharding import (
    equal_passes,
    no_sync,
    reshard,
    runs_in_lockstep,
    shard_by_fsdp2,
    shard_reference,
    sharded_policy,
    verify_before_sharding,
    whole_state_dict,
)
from stepdpo_kernels.types import PackedBatch, StepDPOError, StepPair

logger = logging.getLogger("stepdpo_kernels")


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
            `args.reference` says whether it is asked once, before training, or in every step.
        peft_config: a peft configuration to wrap the model with.
        eval_dataset: a sequence of StepPair to evaluate on.
        compute_metrics: called after an evaluation with a `transformers.EvalPrediction` over the pairs in their order:
            predictions are (rewards, log-probs), each (N, 2), chosen and rejected, float32; label_ids is (N,) zeros,
            the column to prefer. What it returns is logged with the prefix of the evaluation.
        **trainer_options: further arguments of `transformers.Trainer`, such as callbacks or optimizers.

    Logged, as means over the pairs since the last log: loss, rewards/chosen, rewards/rejected, rewards/margins,
    rewards/accuracies, logps/chosen, logps/rejected (nats), tokens/saved (share of the tokens that unshared branches
    would take), tokens/batch (encoded a forward pass), and Trainer's own. Also tokens/encoded (all since the last log),
    pairs_per_second and tokens_per_second (encoded ones), without the time of evaluation and saving.

    A loss or gradient that is not finite changes no weights: it is reported with the ids of its pairs, and StepDPOError
    raised, or the optimiser step skipped (`on_nonfinite`). With torch's fused Adam and AdamW (the default of `optim`)
    that is before the next update, and before anything is logged, evaluated or saved, so that no step waits for the
    device; with others it is before the update that is refused, and callbacks do not see the end of that step.

    Raises StepDPOError, before anything is written, for a model that cannot be packed, a pair over the token budget or
    with tokens that the model lacks, an empty dataset, an option of Trainer that would have no effect here or has not
    been shown to compose, and an unsupported way of distributing.
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
        check_writable(Path(args.output_dir))
        check_distribution(args)
        check_options(args, trainer_options)
        if isinstance(model, str):
            model = load_model(model)
        check_supported(model)
        check_tokenizer(model, processing_class)
        for name, pairs in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if pairs is not None:
                check_pairs(pairs, name, model, args)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # of the adapter's weights
            model = get_peft_model(model, peft_config)
        check_reference(model, ref_model, args)
        if args.reference == "model":
            ref_model = frozen(model if ref_model is None else ref_model, copied=ref_model is None)
        self.ref_model = ref_model
        for either in (model, ref_model):
            if either is not None:
                check_adapter(either)
                keep_layout(either)
                accelerate_layers(either, args)
                enable_packed_forward(either, verify=args.verify_first_batch)
        warn_of_lost_updates(model)
        self.loss = args.build_loss(**head_options(model))
        super().__init__(
            model=model,
            args=args,
            data_collator=StepCollator(args.max_tokens_per_batch, args.share, args.max_keys_per_batch),
            train_dataset=None if train_dataset is None else IndexedPairs(train_dataset),
            eval_dataset=None if eval_dataset is None else IndexedPairs(eval_dataset),
            processing_class=processing_class,
            **trainer_options,
        )
        check_accelerator(self.accelerator, model)
        if runs_in_lockstep(self.accelerator):
            pairs = self.eval_dataset if train_dataset is None else self.train_dataset
            for either in (model, ref_model):
                if either is not None and pairs is not None:
                    some = self.data_collator([pairs[i] for i in range(min(PAIRS, len(pairs)))])
                    verify_before_sharding(either, some[0], self.accelerator)
            if ref_model is not None:
                self.ref_model = shard_reference(ref_model, self.accelerator)
        elif ref_model is not None and args.reference == "model":
            ref_model.to(args.device)
        self.add_callback(SetEpoch)
        self._meter = Meter()
        use_step_progress(self, self._meter)
        self._parts: list[tuple[PackedBatch, StepDPOOutput]] = []  # forward passes of the step in progress
        self._steps, self._skipped = 0, 0  # since the last log
        self._verdict: Verdict | None = None  # on the last step, until it is read
        self._refused = False  # the last step whose verdict was read
        self._staging: Path | None = None
        self.references = RefLogps(self)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without torch.compile of the whole model: its layers are compiled already."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # ---- reference log-probs ------------------------------------------------------------------------------------

    def prepare_references(self) -> None:
        """Fills in the reference log-probs of both datasets, once, while the policy is still the reference.

        `train` and `evaluate` call it first; calling it earlier only moves the work.
        """
        self.references.prepare()

    def reference_key(self, name: str, dataset: IndexedPairs) -> dict[str, str]:
        """What the reference log-probs of a dataset ("train" or "eval") depend on: the key of their cache file."""
        return self.references.key(name, dataset)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(*args, **kwargs)
        # Trainer calls this when the model is wrapped, and has neither been trained nor loaded from a checkpoint.
        if self._runnable_policy() is not None:
            self.references.policy_is_sharded()
        return scheduler

    def _runnable_policy(self) -> nn.Module | None:
        """The policy as it must be run in evaluation; None where `train` has yet to shard it."""
        return sharded_policy(self.model, self.accelerator) if runs_in_lockstep(self.accelerator) else self.model

    # ---- optimiser steps ----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item for each optimiser step: this process's share of its pairs, packed."""
        args = self.args
        seed = None if args.train_sampling_strategy == "sequential" else self._order_seed()
        per_step = args.per_device_train_batch_size * args.world_size
        sampler = step_sampler(self.train_dataset, per_step, args, seed=seed, drop_last=args.dataloader_drop_last)
        return step_loader(self.train_dataset, sampler, self.data_collator, args)

    def get_eval_dataloader(self, eval_dataset: IndexedPairs | None = None) -> DataLoader[Any]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sampler = step_sampler(dataset, self.args.per_device_eval_batch_size * self.args.world_size, self.args)
        return step_loader(dataset, sampler, self.data_collator, self.args)

    get_test_dataloader = get_eval_dataloader

    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # ---- training -----------------------------------------------------------------------------------------------

    def plan(self) -> TrainingPlan:
        """What `train` would do: steps, packing, memory, where the reference comes from; `print` shows it.

        The pairs of the first epoch are packed as training packs them, step by step. The model is read for its sizes
        and for the key of its reference; it is not run, and nothing is written or changed. All processes must call it.
        Raises StepDPOError without a train_dataset.
        """
        if self.train_dataset is None:
            raise StepDPOError("train_dataset is missing")
        return plan_training(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, after the reference log-probs are there.

        Raises StepDPOError when output_dir holds another run, or when a resumed run began with another reference,
        other pairs or other packing.
        """
        if self.train_dataset is None:
            raise StepDPOError("train_dataset is missing")
        output_dir = self.args.output_dir
        checkpoint = check_output_dir(output_dir, resume_from_checkpoint)
        self.accelerator.wait_for_everyone()  # before the first of them writes there
        self.prepare_references()
        if resume_from_checkpoint:
            began_with = read_run_file(output_dir if checkpoint is None else checkpoint.parent).get("reference", {})
            changed = key_differences(began_with["train"], self.references.keys["train"]) if began_with else []
            if changed:
                raise StepDPOError(
                    f"cannot resume {str(checkpoint or output_dir)!r}: that run began with {', '.join(changed)}"
                )
        known = {} if checkpoint is None else read_run_file(output_dir)
        begins = self.is_world_process_zero() and not known
        if self.is_world_process_zero():
            write_run_file(output_dir, self._describe(known, checkpoint))
        self._meter.reset()
        self._steps, self._skipped, self._refused = 0, 0, False
        try:
            return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        except BaseException:
            if begins:
                remove_unstarted_run(output_dir)
            raise
        finally:
            self._verdict = None
            if skips_on_device(optimizer := unwrapped(self.optimizer), self.accelerator):
                vars(optimizer).pop("found_inf", None)  # somebody may go on with it

    def _describe(self, known: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
        """What the run file is to hold: what it holds, what it lacks, and what goes on otherwise from a checkpoint."""
        if missing_parts(known):
            eval_pairs = None if self.eval_dataset is None else self.eval_dataset.pairs
            return {
                **describe_run(self.args, self.model, self.train_dataset.pairs, eval_pairs),
                "reference": self.references.keys,
                "reference_pass": {"computed": self.references.computed, "seconds": self.references.seconds},
            } | known
        changed = changed_settings(known, self.args)
        if checkpoint is None or not changed:
            return known
        return known | {"resumed": [*known.get("resumed", []), {"from": checkpoint.name, "config": changed}]}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_by_fsdp2(self.accelerator, self.args.fsdp_plugin_args)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            return [], None  # Trainer takes a step before it sees that a run which is resumed was over
        self._meter.start()  # packing is part of a step's time
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: list[PackedBatch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of all micro-batches of one optimiser step; returns its loss on this process."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        num_pairs = self._pairs_per_process(inputs)
        self._parts = []
        total = torch.zeros((), device=self.args.device)
        passes = list(equal_passes([inputs], self.accelerator, self._nothing)) or [(self._nothing(), False)]
        for i, (batch, counts) in enumerate(passes):
            batch = batch.to(self.args.device, non_blocking=self.args.dataloader_pin_memory)
            is_last = i == len(passes) - 1
            ref_logps = self.references.of_batch(batch, self.train_dataset)
            with nullcontext() if is_last else no_sync(self.accelerator, model):
                with self.compute_loss_context_manager():
                    output = self._packed_loss(model, batch, ref_logps, num_pairs)
                self.accelerator.backward(output.loss)
            if counts:
                output = output._replace(loss=output.loss.detach())
                total += output.loss
                self._parts.append((batch, output))
        # a loss that is not finite is dealt with where the gradient's norm is known, and must not stay in the sum
        return total.nan_to_num(0.0, 0.0, 0.0) if self.args.on_nonfinite == "skip" else total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's, called between backward and the update: where something is not finite there is no update.

        The device can see to that by itself with some optimisers. Then the host looks a step later, when the device is
        busy with what came after, or when somebody wants to know.
        """
        self._settle()
        norm = super()._get_grad_norm(model, grad_norm)
        self._steps += 1
        self._meter.hold(self._parts)
        # In fp16 gradients overflow now and then, which its scaler answers; and DeepSpeed may know of no norm.
        known = None if self.args.fp16 else norm
        self._verdict = Verdict(self.state.global_step + 1, self._parts, known, self.accelerator)
        optimizer = unwrapped(self.optimizer)
        if skips_on_device(optimizer, self.accelerator):
            self._verdict.tell(optimizer)
            return norm
        self._settle()
        if self._refused:
            model.zero_grad(set_to_none=True)  # so that the optimiser changes nothing
        return norm

    def _settle(self) -> None:
        """Reads the verdict on the last step, unless that was done: its numbers count, or its pairs are named.

        To be called before anything is made of the step. Raises StepDPOError where it is refused, or passes over it.
        """
        if self._verdict is None:
            return
        wrong = self._verdict.read(self.train_dataset.pairs)
        where = f"step {self._verdict.step}: not finite: {wrong}"
        if wrong is not None and self.args.on_nonfinite == "stop":  # again, if somebody goes on nevertheless
            # DeepSpeed takes its step within the backward pass
            left = "" if self.is_deepspeed_enabled else "; the weights are those of the step before"
            raise StepDPOError(
                f"{where}{left}. Leave the pairs out, lower the learning rate, or pass over such steps with "
                "on_nonfinite='skip'"
            )
        self._verdict, self._refused = None, wrong is not None
        self._meter.settle(counts=not self._refused)
        if self._refused:
            logger.warning("%s; this step is skipped", where)
            self._skipped += 1

    def _nothing(self) -> PackedBatch:
        """For a process with fewer passes than others, which must still take part in sums and gathers: with zeros."""
        dataset = self.eval_dataset if self.train_dataset is None else self.train_dataset
        (batch,) = self.data_collator([dataset[0]])
        return replace(batch, weights=torch.zeros_like(batch.weights))

    def _pairs_per_process(self, inputs: list[PackedBatch]) -> float:
        """Pairs of this optimiser step over all processes, divided by the processes that average their gradients."""
        pairs = sum(batch.num_pairs for batch in inputs)
        if self.args.world_size == 1:
            return pairs
        total = self.accelerator.reduce(torch.tensor(float(pairs), device=self.args.device), reduction="sum")
        return float(total) / self.args.world_size

    def _packed_loss(
        self, model: nn.Module, batch: PackedBatch, ref_logps: Tensor | None, num_pairs: float
    ) -> StepDPOOutput:
        def head(hidden: Tensor, lm_head: nn.Linear) -> StepDPOOutput:
            return self.loss.packed(hidden, lm_head.weight, batch, ref_logps, bias=lm_head.bias, num_pairs=num_pairs)

        with self._autocast():
            return model(packed_batch=batch, head=head)

    def _logps(self, model: nn.Module, batch: PackedBatch) -> Tensor:  # (2P,)
        def head(hidden: Tensor, lm_head: nn.Linear) -> Tensor:
            return self.loss.packed_logps(hidden, lm_head.weight, batch, bias=lm_head.bias)

        with self._autocast():
            return model(packed_batch=batch, head=head)

    def _autocast(self) -> torch.autocast:
        """What accelerate wraps a prepared model in; here too, since it does not prepare a reference."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype is not None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._settle()  # also at the end of training, which logs what it took
        if "loss" in logs:
            if self._refused:
                logs.pop("grad_norm", None)
            metrics = self._meter.drain(self.accelerator, steps=self._steps - self._skipped)
            if self._skipped:
                del logs["loss"]  # over all steps, the skipped ones too
                logs.update(metrics, **{"steps/skipped": self._skipped})
            else:
                logs.update(metrics, loss=logs["loss"])
            self._steps, self._skipped = 0, 0
        logs.update({name: value + 0.0 for name, value in logs.items() if isinstance(value, float)})  # -0.0 becomes 0.0
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
        self._settle()
        self._meter.pause()
        self.prepare_references()
        if eval_dataset is not None:
            eval_dataset = self._with_references(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Sequence[StepPair] | IndexedPairs,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As `evaluate`, with what `compute_metrics` is given: (rewards, log-probs), each (N, 2), and (N,) zeros."""
        self._settle()
        self._meter.pause()
        self.prepare_references()
        return super().predict(self._with_references(test_dataset, "test_dataset"), ignore_keys, metric_key_prefix)

    def _with_references(self, pairs: Sequence[StepPair] | IndexedPairs, name: str) -> IndexedPairs:
        if isinstance(pairs, IndexedPairs):
            return pairs
        check_pairs(pairs, name, self.model, self.args)
        dataset = IndexedPairs(pairs)
        if not self.loss.reference_free:
            gone = self.ref_model is None and self.args.reference == "precomputed"
            if gone and self.state.global_step > 0:
                raise StepDPOError(f"{name}: give it to StepDPOTrainer at the start, as eval_dataset, or a ref_model")
            self.references.fill("eval", dataset, partial(self.get_eval_dataloader, dataset))
        return dataset

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # Not DistributedDataParallel's: processes may have different numbers of forward passes here.
        model = self._runnable_policy()
        if model is None:
            raise StepDPOError("evaluate: `train` shards the model; evaluate then, also by eval_on_start=True")
        model.eval()
        dataset: IndexedPairs = dataloader.dataset  # type: ignore[assignment]
        table = torch.zeros(len(dataset), 4, device=self.args.device)  # rewards, then log-probs
        meter = Meter()
        meter.start()
        for batch, counts in equal_passes(self._evaluation_steps(dataloader), self.accelerator, self._nothing):
            batch = batch.to(self.args.device, non_blocking=self.args.dataloader_pin_memory)
            ref_logps = self.references.of_batch(batch, dataset)
            with self.compute_loss_context_manager():
                output = self._packed_loss(model, batch, ref_logps, num_pairs=1)
            if not counts:
                continue
            meter.add(batch, output)
            parts = (output.chosen_rewards, output.rejected_rewards, output.chosen_logps, output.rejected_logps)
            table[batch.pair_index] = torch.stack(parts, dim=1).float()
        reshard(model)
        metrics = meter.drain(self.accelerator)
        rewards, logps = self.accelerator.reduce(table, reduction="sum").cpu().numpy().reshape(-1, 2, 2).swapaxes(0, 1)
        predictions, label_ids = (rewards, logps), np.zeros(len(dataset), dtype=np.int64)
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
        prefixed = {
            name if name.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{name}": value
            for name, value in metrics.items()
        }
        return EvalLoopOutput(predictions=predictions, label_ids=label_ids, metrics=prefixed, num_samples=len(dataset))

    def _evaluation_steps(self, dataloader: DataLoader[Any]) -> Iterator[list[PackedBatch]]:
        self.callback_handler.eval_dataloader = dataloader
        for step in dataloader:
            yield step
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves beside the checkpoints and renames, so that a checkpoint is whole or absent."""
        self._settle()  # before the folder is made, and the clock stops
        self._meter.pause()
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with explained(name, run_dir), staged(run_dir, owner=self.args.should_save) as folder:
            self.accelerator.wait_for_everyone()
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
                to_standard_json(folder / name / "trainer_state.json")
                put_in_place(folder / name, run_dir / name)
                rotate(run_dir, folder, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes model, tokenizer and arguments beside their place and renames them, so that no file is half there."""
        if not self.args.should_save:
            return
        target = Path(output_dir if output_dir is not None else self.args.output_dir)
        # a checkpoint's is part of that, which explains
        explanation = nullcontext() if self._staging is not None else explained("the model", target)
        with explanation, staged(target) as folder:
            super()._save(str(folder), state_dict)
            for file in sorted(folder.iterdir()):
                if file.name != CARD_FILE:  # peft's, which has nothing but blanks
                    put_in_place(file, target / file.name)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a model card after training; one that somebody else put there stays."""
        self._settle()
        with nullcontext() if _internal_call else whole_state_dict(self.accelerator):
            super().save_model(output_dir, _internal_call)
        is_pushed = self.args.push_to_hub and output_dir in (None, self.args.output_dir)  # and got its card
        if not _internal_call and not is_pushed:
            write_card_of(self, output_dir)

    def create_model_card(self, *args: Any, **given: Any) -> None:
        """Writes the model card of a run into output_dir, as `push_to_hub` does; before any run, Trainer's."""
        if not write_card_of(self, None, *args, **given):
            super().create_model_card(*args, **given)

    def write_report(self) -> Path:
        """Writes `report.md` and `report.png` of the whole run into output_dir, on the main process.

        The picture needs matplotlib. Raises StepDPOError where nothing was trained.
        """
        if self.is_world_process_zero():
            write_report(self.args.output_dir, self.state)
        return Path(self.args.output_dir) / REPORT_FILE

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else once the checkpoint is in its place
            super()._push_from_checkpoint(checkpoint_folder)
