"""What the tests of training share: small runs, and a watch on what a trainer computes."""

from __future__ import annotations

import atexit
import gc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stepdpo_kernels.data import StepPairDataset, load_step_pairs
from stepdpo_kernels.loss import StepDPOOutput
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer
from stepdpo_kernels.types import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Every training run collects garbage first, which takes longer than a small run when it looks at all of torch.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """One record a line; a string is written as it is."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def make_pairs(records: Iterable[Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> StepPairDataset:
    return load_step_pairs(write_jsonl(folder / "pairs.jsonl", records), tokenizer)


def make_config(folder: Path, **fields: Any) -> StepDPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "reference_cache_dir": str(folder / "cache"),
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "pairs_per_step": 4,
        "max_tokens_per_batch": 250,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return StepDPOConfig(**settings | fields)


class Seen(NamedTuple):
    """One call of the packed loss."""

    batch: PackedBatch
    output: StepDPOOutput
    training: bool


def watch(trainer: StepDPOTrainer) -> list[Seen]:
    """A list that grows by every forward pass for which the trainer computes a loss."""
    seen: list[Seen] = []
    packed = trainer.loss.packed

    def watched(hidden: Tensor, weight: Tensor, batch: PackedBatch, *args: Any, **options: Any) -> StepDPOOutput:
        output = packed(hidden, weight, batch, *args, **options)
        seen.append(Seen(batch, output, torch.is_grad_enabled()))
        return output

    trainer.loss.packed = watched  # type: ignore[method-assign]
    return seen


def losses(trainer: StepDPOTrainer) -> list[float]:
    """The loss of each optimiser step, as logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def steps_of(seen: Sequence[Seen], pairs_per_step: int, num_pairs: int) -> list[list[int]]:
    """Which pairs each optimiser step trained on, from the forward passes of training."""
    steps: list[list[int]] = [[]]
    in_epoch = 0
    for batch, _, training in seen:
        if training:
            steps[-1] += batch.pair_index.tolist()
            in_epoch += batch.num_pairs
            if len(steps[-1]) == pairs_per_step or in_epoch == num_pairs:
                steps.append([])
                in_epoch %= num_pairs
    return steps[:-1]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def entries(folder: Path) -> list[str]:
    """Names of what is in a folder, hidden files too; empty where there is no folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
