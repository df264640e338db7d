"""The reference of a trainer: which model it is, and its log-probs of a batch, from a table or computed in the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stepdpo_kernels.model import head_options
from stepdpo_kernels.trainer.collate import IndexedPairs
from stepdpo_kernels.trainer.nonfinite import check_finite
from stepdpo_kernels.trainer.reference import (
    PartialTable,
    cache_key,
    compute_ref_logps,
    load_or_compute,
    weights_fingerprint,
)
from stepdpo_kernels.trainer.sharding import equal_passes, reshard, runs_in_lockstep, same_for_all
from stepdpo_kernels.types import PackedBatch

if TYPE_CHECKING:
    from stepdpo_kernels.trainer.trainer import StepDPOTrainer


class RefLogps:
    """The reference log-probs of a trainer's datasets.

    Where they are precomputed, each dataset gets its table (`IndexedPairs.ref_logps`) while the policy is still the
    reference: at once, or, of a policy that is going to be sharded, once it is.

    keys:           of the cache files, by dataset ("train", "eval"), also where nothing is precomputed
    ready:          whether `prepare` has been called
    computed:       datasets whose tables were computed and not read from a cache
    seconds:        that `prepare` took; None where the model is yet to be sharded, so that it is not known
    """

    def __init__(self, trainer: StepDPOTrainer) -> None:
        self.trainer = trainer
        self.keys: dict[str, dict[str, str]] = {}
        self.ready = False
        self.computed: list[str] = []
        self.seconds: float | None = 0.0
        self._when_sharded: list[Callable[[], None]] = []

    @property
    def model(self) -> Any:
        """The reference, without what shards it: ref_model, or the policy."""
        return self.trainer.model if self.trainer.ref_model is None else self.trainer.ref_model

    def prepare(self) -> None:
        """Fills in both datasets, once."""
        if self.ready:
            return
        trainer, began = self.trainer, time.perf_counter()
        if trainer.train_dataset is not None:
            self.fill("train", trainer.train_dataset, trainer.get_train_dataloader)
        if trainer.eval_dataset is not None:
            self.fill("eval", trainer.eval_dataset, trainer.get_eval_dataloader)
        self.ready = True
        self.seconds = None if self._when_sharded else round(time.perf_counter() - began, 3)

    def key(self, name: str, dataset: IndexedPairs) -> dict[str, str]:
        """What the log-probs of a dataset ("train" or "eval") depend on."""
        trainer, args = self.trainer, self.trainer.args
        with_adapter = trainer.ref_model is not None
        return cache_key(
            same_for_all(trainer.accelerator, weights_fingerprint(self.model, with_adapter=with_adapter)),
            dataset.pairs,
            {
                "sharding": trainer.accelerator.distributed_type.value if runs_in_lockstep(trainer.accelerator) else "",
                "liger": args.liger_kernel_config if args.use_liger_kernel else None,
                "compile": [args.torch_compile_backend, args.torch_compile_mode] if args.torch_compile else None,
            },
            name=name,
            reference=args.reference,
            bf16=args.bf16,
            fp16=args.fp16,
            device=args.device.type,
            world=args.world_size,
            max_tokens_per_batch=args.max_tokens_per_batch,
            max_keys_per_batch=args.max_keys_per_batch,
            share=args.share,
            **head_options(self.model),
            **(
                {
                    "pairs_per_step": args.pairs_per_step,
                    "order": args.train_sampling_strategy,
                    "seed": trainer._order_seed(),
                }
                if name == "train"
                else {"per_device_eval_batch_size": args.per_device_eval_batch_size}
            ),
        )

    def fill(self, name: str, dataset: IndexedPairs, dataloader: Callable[[], DataLoader[Any]]) -> None:
        """The table of a dataset, in the forests in which its dataloader first gives its pairs; later if it must be."""
        trainer = self.trainer
        key = self.keys[name] = self.key(name, dataset)
        if trainer.args.reference != "precomputed":
            return

        def fill() -> None:
            def compute(partial: PartialTable) -> Tensor:
                return self._table(name, dataset, dataloader, partial)

            table = load_or_compute(trainer.args.reference_cache_dir, key, compute, trainer.accelerator)
            dataset.ref_logps = table.to(trainer.args.device)

        if trainer.ref_model is None and trainer._runnable_policy() is None:
            self._when_sharded.append(fill)
        else:
            fill()

    def policy_is_sharded(self) -> None:
        """Fills in what had to wait for that."""
        while self._when_sharded:
            self._when_sharded.pop(0)()

    def _table(
        self, name: str, dataset: IndexedPairs, dataloader: Callable[[], DataLoader[Any]], partial: PartialTable
    ) -> Tensor:  # (N, 2)
        trainer, args, model = self.trainer, self.trainer.args, self.model

        def table_of(steps: Iterable[list[PackedBatch]], partial: PartialTable | None = None) -> Tensor:
            progress = not args.disable_tqdm and trainer.is_world_process_zero()
            batches = equal_passes(steps, trainer.accelerator, trainer._nothing)
            runs = trainer._runnable_policy() if trainer.ref_model is None else model
            return compute_ref_logps(
                runs, len(dataset), batches, trainer._logps, trainer.accelerator, progress=progress, partial=partial
            )

        self.computed.append(name)
        # The order of training must be the same whether this pass ran or a cache was read.
        gpus = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), self._on_device(), self._asked():
            table = table_of(dataloader(), partial)
            left = table.isnan().any(dim=1)  # pairs that dataloader_drop_last keeps out of the first epoch
            if left.any():
                step = trainer.data_collator([dataset[i] for i in left.nonzero()[:, 0].tolist()])
                table[left] = table_of([step])[left]
            reshard(model)
        check_finite(table, dataset.pairs, f"{name}_dataset")
        return table

    def of_batch(self, batch: PackedBatch, dataset: IndexedPairs) -> Tensor | None:  # (2P,)
        """The reference's branch log-probs of a batch: from the table, or computed now; None for a loss without any.

        To be called outside the autocast of the policy's forward, which would keep weights cast without gradients.
        """
        if self.trainer.loss.reference_free:
            return None
        if dataset.ref_logps is not None:
            return dataset.ref_logps[batch.pair_index].T.reshape(-1)
        with torch.no_grad(), self._asked() as reference:
            return self.trainer._logps(reference, batch)

    @contextmanager
    def _asked(self) -> Iterator[nn.Module]:
        """The reference, to be run: ref_model with its adapters, or the policy without its own."""
        if self.trainer.ref_model is not None:
            yield self.trainer.ref_model
            return
        policy = self.trainer._runnable_policy()
        assert policy is not None
        with getattr(self.trainer.model, "disable_adapter", nullcontext)():
            yield policy

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """A separate reference is on the training device only while it is read."""
        if self.trainer.ref_model is None or runs_in_lockstep(self.trainer.accelerator):
            yield
            return
        home = next(self.model.parameters()).device
        self.model.to(self.trainer.args.device)
        try:
            yield
        finally:
            self.model.to(home)
