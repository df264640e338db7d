"""TRL's DPO loss on given log-probs of tokens, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class _Logged(dict[str, Any]):
    def __missing__(self, name: str) -> list[Any]:
        return self.setdefault(name, [])


def trl_loss(
    types: list[str],
    token_logps: Tensor,  # (2P, L)
    keep: Tensor,  # (2P, L)
    refs: Tensor,  # (2P,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
) -> Tensor:
    """`DPOTrainer._compute_loss` on log-probs of tokens, of which `keep` says those of the completions."""
    from trl import DPOTrainer

    same = SimpleNamespace(
        device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values, num_processes=1
    )
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=same,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=types,
        loss_weights=loss_weights or [1.0] * len(types),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": _Logged(), "eval": _Logged()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(token_logps)
    outputs = SimpleNamespace(log_probs=token_logps * keep, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    mask = torch.cat([torch.zeros(len(keep), 1), keep.long()], dim=1).long()  # TRL leaves the first token out
    chosen, rejected = refs.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    return loss
