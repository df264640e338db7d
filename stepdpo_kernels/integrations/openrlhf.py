"""OpenRLHF's DPO trainer on packed forests: prefixes that a micro-batch shares are encoded once, without logits.

    deepspeed --module stepdpo_kernels.integrations.openrlhf --stepdpo.end_of_step drop --data.dataset ...

in place of `deepspeed --module openrlhf.cli.train_dpo ...`, or `accelerate_dpo(trainer)` where a script makes its own
`DPOTrainer`. Its `concatenated_forward` then packs the micro-batch, and the model computes log-probs from the forest.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels.integrations.forest_forward import Accelerated, add_forest_forward
from stepdpo_kernels.integrations.versions import require
from stepdpo_kernels.packing import PaddedForest, pack_padded
from stepdpo_kernels.types import StepDPOError

VERSION = require("openrlhf", "0.11.2", "0.11.3")
from openrlhf.trainer import dpo_trainer  # noqa: E402 (after its version is known)

ENDS = ("keep", "drop")
SPACES = ("Ġ", "▁", " ")  # as tokens: of byte-level BPE, of SentencePiece, of others
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # chosen ids and mask, rejected ids and mask: what the trainer passes


def accelerate_dpo(trainer: dpo_trainer.DPOTrainer, *, share: str = "tree", end_of_step: str = "keep") -> Accelerated:
    """Lets OpenRLHF's DPO trainer train on packed forests, until `remove()` of what is returned is called.

    Args:
        trainer: of OpenRLHF 0.11.2, its models prepared by the strategy or not, before `trainer.fit()`.
        share: as in `pack_pairs`: "tree", "pair" or "none".
        end_of_step: what becomes of the EOS that OpenRLHF puts after every answer, and of the space before it. "keep"
            for whole solutions; "drop" for steps, after which a solution goes on: neither is encoded nor in the loss.

    Raises:
        StepDPOError: an option or a model that this cannot take, with what to do.
        ValueError: an unknown `end_of_step`, or, at the first batch, an unknown `share`.
    """
    if end_of_step not in ENDS:
        raise ValueError(f"end_of_step must be one of {', '.join(ENDS)}, got {end_of_step!r}")
    if not isinstance(trainer, dpo_trainer.DPOTrainer):
        raise StepDPOError(f"trainer: expected OpenRLHF's DPOTrainer, got {type(trainer).__name__}")
    if "concatenated_forward" in vars(trainer):
        raise StepDPOError("this trainer is accelerated already")
    reasons = why_not(trainer)
    if reasons:
        raise StepDPOError(f"this DPOTrainer cannot be accelerated: {'; '.join(reasons)}")
    forward = _ConcatenatedForward(share, end_of_step == "drop")
    with Accelerated() as undo:
        for actor in (trainer.model, trainer.ref_model):
            undo.callback(add_forest_forward(actor.model))
        trainer.concatenated_forward = MethodType(forward, trainer)
        undo.callback(delattr, trainer, "concatenated_forward")
        return undo.pop_all()


def why_not(trainer: dpo_trainer.DPOTrainer) -> list[str]:
    """Every reason, apart from its models, why a trainer cannot be accelerated."""
    ds, reasons = trainer.args.ds, []
    if trainer.aux_loss:
        reasons.append("model.aux_loss_coef asks for a loss on the routing of padded tokens: set it to 0")
    for name in ("ring_attn_size", "tensor_parallel_size"):
        if getattr(ds, name, 1) > 1:
            reasons.append(f"ds.{name} is {getattr(ds, name)}, and a forest is not cut up: set it to 1")
    for actor in (trainer.model, trainer.ref_model):
        if getattr(actor, "temperature", 1.0) != 1.0:
            reasons.append(f"the temperature of an Actor is {actor.temperature}, which divides its logits: set it to 1")
    return reasons


class _ConcatenatedForward:
    """`DPOTrainer.concatenated_forward`; policy and reference share the forest of a batch."""

    def __init__(self, share: str, drop_end: bool) -> None:
        self.share, self.drop_end = share, drop_end
        self.packed: tuple[Batch, PaddedForest] | None = None

    def __call__(
        self,
        trainer: dpo_trainer.DPOTrainer,
        model: Any,
        chosen_ids: Tensor,
        c_mask: Tensor,
        reject_ids: Tensor,
        r_mask: Tensor,
        prompt_id_lens: list[int],
    ) -> tuple[Tensor, Tensor, list[Any], Tensor]:
        """(P,) sums of the chosen and of the rejected log-probs, no auxiliary loss, mean NLL of the chosen."""
        batch = (chosen_ids, c_mask, reject_ids, r_mask)
        if self.packed is None or any(old is not new for old, new in zip(self.packed[0], batch, strict=True)):
            ids, mask, prompts = trainer.concatenated_inputs(*batch, prompt_id_lens)
            self.packed = batch, self.pack(ids, mask, prompts, trainer.tokenizer).to(chosen_ids.device)
        forest = self.packed[1]
        logps = model.model(stepdpo_forest=forest).logps.sum(-1)
        means = logps / forest.mask.sum(-1)
        pairs = chosen_ids.shape[0]
        return logps[:pairs], logps[pairs:], [], -means[:pairs].mean()

    def pack(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_id_lens: list[int], tokenizer: Any
    ) -> PaddedForest:
        ids, real = input_ids.cpu(), attention_mask.cpu().bool()
        if self.drop_end:
            spaces = torch.tensor([i for i in map(tokenizer.get_vocab().get, SPACES) if i is not None])
            last = real.sum(-1, keepdim=True) - 1  # (2P, 1), padded on the right
            real.scatter_(1, last, False)  # always an EOS: the data set writes one there
            is_space = torch.isin(ids.gather(1, last - 1), spaces)
            real.scatter_(1, last - 1, real.gather(1, last - 1) & ~is_space)
        answer = torch.arange(ids.shape[1]) >= torch.tensor(prompt_id_lens)[:, None]
        return pack_padded(ids, real, real & answer, share=self.share)


def main() -> None:
    """OpenRLHF's DPO command, its trainer accelerated; `--stepdpo.share` and `--stepdpo.end_of_step` are ours."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stepdpo.share", dest="share", choices=("tree", "pair", "none"), default="tree")
    parser.add_argument("--stepdpo.end_of_step", dest="end_of_step", choices=ENDS, default="keep")
    ours, sys.argv[1:] = parser.parse_known_args()

    class DPOTrainer(dpo_trainer.DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            accelerate_dpo(self, **vars(ours))

    plain, dpo_trainer.DPOTrainer = dpo_trainer.DPOTrainer, DPOTrainer
    try:
        runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__", alter_sys=True)
    finally:
        dpo_trainer.DPOTrainer = plain


if __name__ == "__main__":
    main()
