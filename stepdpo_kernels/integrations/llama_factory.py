"""LLaMA-Factory's DPO trainer on packed forests: prefixes that a micro-batch shares are encoded once, without logits.

    python -m stepdpo_kernels.integrations.llama_factory train step_dpo.yaml

in place of `llamafactory-cli train step_dpo.yaml`, or `accelerate_dpo(trainer)` where a script makes its own
`CustomDPOTrainer`. The collator adds the forest of its padded batch, and `concatenated_forward` has the model compute
log-probs from it. Losses, reference models, adapters, metrics and checkpoints stay LLaMA-Factory's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels.integrations.forest_forward import Accelerated, add_forest_forward
from stepdpo_kernels.integrations.versions import require
from stepdpo_kernels.model import causal_lm, is_tested, verify_once
from stepdpo_kernels.packing import PaddedForest, pack_padded
from stepdpo_kernels.types import StepDPOError

VERSION = require("llamafactory", "0.9.5", "0.9.6")
from llamafactory.train.dpo import trainer as dpo  # noqa: E402 (after its version is known)

KEY = "stepdpo_forest"
FIELDS = {"input_ids", "attention_mask", "labels"}
EXAMPLES_TO_VERIFY = 3
AVERAGED = ("ipo", "orpo", "simpo")
OTHER_TRAINERS = ("USE_MCA", "USE_RAY", "USE_V1")  # each a variable of LLaMA-Factory's that asks for another one


def accelerate_dpo(trainer: dpo.CustomDPOTrainer, *, share: str = "tree") -> Accelerated:
    """Lets LLaMA-Factory's DPO trainer train on packed forests, until `remove()` of what is returned is called.

    Call it before `trainer.train()`.

    Args:
        trainer: of LLaMA-Factory 0.9.5, on text alone.
        share: as in `pack_pairs`: "tree", "pair" or "none".

    Raises:
        StepDPOError: a trainer, an option or a model that this cannot take, with what to do.
        ValueError: an unknown `share`, at the first batch.
    """
    if not isinstance(trainer, dpo.CustomDPOTrainer):
        raise StepDPOError(
            f"trainer: expected LLaMA-Factory's CustomDPOTrainer (stage: dpo), got {type(trainer).__name__}; other "
            "stages train without packed forests"
        )
    if isinstance(trainer.data_collator, PackedCollator):
        raise StepDPOError("this trainer is accelerated already")
    if trainer.args.neftune_noise_alpha is not None:
        raise StepDPOError("neftune_noise_alpha: its noise is scaled by the padded length of a text: leave it out")
    ignored = getattr(trainer.data_collator, "label_pad_token_id", -100)
    if ignored != -100:
        raise StepDPOError(f"padding has the label {ignored}, not -100: set ignore_pad_token_for_loss: true")
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    lms: list[Any] = list(dict.fromkeys(map(causal_lm, models)))  # one, where a model is its own reference
    with Accelerated() as undo:
        for model in models[: len(lms)]:
            undo.callback(add_forest_forward(model))
        undo.callback(setattr, trainer, "data_collator", trainer.data_collator)
        trainer.data_collator = PackedCollator(trainer.data_collator, share)
        if not is_tested(lms[0]) and trainer.train_dataset is not None:  # compared now, before its weights are sharded
            batch = trainer.data_collator(list(islice(trainer.train_dataset, EXAMPLES_TO_VERIFY)))[KEY].batch
            verify_once(lms[0], batch.to(lms[0].device))
            for lm in lms:
                lm._verify_packing = lms[0]._verify_packing
        undo.callback(delattr, trainer, "concatenated_forward")
        trainer.concatenated_forward = MethodType(_concatenated_forward, trainer)
        return undo.pop_all()


@dataclass
class PackedCollator:
    """LLaMA-Factory's collator, whose batches also hold their forest."""

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    share: str

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(features)
        foreign = sorted(set(batch) - FIELDS)
        if foreign:
            raise StepDPOError(
                f"the batch has {', '.join(foreign)}, and a forest is of text alone: train with llamafactory-cli"
            )
        batch[KEY] = pack_padded(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100, share=self.share)
        return batch


def _concatenated_forward(
    self: dpo.CustomDPOTrainer, model: Any, batch: dict[str, Any], is_ref_model: bool = False
) -> dict[str, Tensor]:
    """What `CustomDPOTrainer.concatenated_forward` returns, but for logits: of each loss token the mean of its logits.

    chosen_logps, rejected_logps, chosen_logps_avg: (P,) float32. chosen_logits, rejected_logits: (tokens,).
    """
    forest: PaddedForest = batch[KEY]
    pairs = forest.mask.shape[0] // 2
    with self.accelerator.autocast():  # which reference models, prepared earlier, have around their old forward
        output = model(stepdpo_forest=forest, statistics=not is_ref_model)
    lengths = forest.mask.sum(-1)
    logps = (output.logps * _token_weights(forest.mask, lengths, None if is_ref_model else self.ld_alpha)).sum(-1)
    if self.loss_type in AVERAGED:
        logps = logps / lengths
    chosen = logps[:pairs]
    result = {
        "chosen_logps": chosen,
        "rejected_logps": logps[pairs:],
        "chosen_logps_avg": chosen if self.loss_type in AVERAGED else chosen / lengths[:pairs],
    }
    if output.statistics is not None:
        for name, half in (("chosen_logits", slice(pairs)), ("rejected_logits", slice(pairs, None))):
            result[name] = output.statistics.mean_logit[half][forest.mask[half]]
    return result


def _token_weights(mask: Tensor, lengths: Tensor, ld_alpha: float | None) -> Tensor:
    """(2P, W-1): LD-DPO's `ld_alpha` for tokens beyond the length of the pair's shorter branch, 1 for the others."""
    if ld_alpha is None:
        return mask.float()
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    return torch.where(mask.cumsum(-1) <= shorter[:, None], 1.0, ld_alpha) * mask


def main() -> None:
    """`llamafactory-cli train`, with its DPO trainer accelerated.

    Exits with a message where the arguments ask for another trainer, or for several processes without torchrun.
    """
    from llamafactory.extras.misc import get_device_count, is_env_enabled
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    name = "stepdpo_kernels.integrations.llama_factory"
    if sys.argv[1:2] != ["train"]:
        sys.exit(f"usage: python -m {name} train FILE.yaml; for other commands take llamafactory-cli")
    for variable in filter(is_env_enabled, OTHER_TRAINERS):
        sys.exit(f"{variable} asks for a trainer that is not accelerated: unset it, or take llamafactory-cli")
    if "LOCAL_RANK" not in os.environ and (is_env_enabled("FORCE_TORCHRUN") or get_device_count() > 1):
        command = " ".join(["torchrun --nproc_per_node", str(get_device_count() or 1), "-m", name, *sys.argv[1:]])
        sys.exit(f"several processes are started by torchrun: {command}")
    del sys.argv[1]
    arguments = read_args()
    if isinstance(arguments, dict):
        stage = arguments.get("stage")
    else:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--stage")
        stage = parser.parse_known_args(arguments)[0].stage
    if stage != "dpo":
        sys.exit(f"stage: {stage} is not accelerated, only dpo is: take llamafactory-cli")

    class CustomDPOTrainer(dpo.CustomDPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            accelerate_dpo(self)

    plain, dpo.CustomDPOTrainer = dpo.CustomDPOTrainer, CustomDPOTrainer
    try:
        run_exp(arguments)
    finally:
        dpo.CustomDPOTrainer = plain


if __name__ == "__main__":
    main()
