"""A run of the trainer against a loop written by hand: padded branches, eager attention, the paper's formula, torch.

The loop takes from the trainer nothing but which pairs each step had.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stepdpo_kernels.loss.reference import step_dpo_loss
from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepPair
from tests.trainer.training import losses, make_pairs, steps_of, watch, weights

WARMUP, BETA = 0.25, 0.4


def logits_of(model, batch: dict[str, Tensor]) -> Tensor:  # (2P, L, V)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def branch_logps(model, pairs: Sequence[StepPair]) -> Tensor:  # (2P,)
    batch = padded_batch(pairs)
    labels = batch["labels"]
    token_logps = torch.log_softmax(logits_of(model, batch), -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (token_logps * (labels != -100)).sum(dim=1)


def plain_run(model, pairs, steps, optimizer, *, smoothing: float = 0.0, clip: float = 1.0) -> list[float]:
    """Trains `model` in place; the losses."""
    model.set_attn_implementation("eager")
    model.train()
    with torch.no_grad():
        reference = {number: branch_logps(model, [pair]) for number, pair in enumerate(pairs)}
    warm = math.ceil(len(steps) * WARMUP)
    peak = optimizer.param_groups[0]["lr"]
    history = []
    for number, step in enumerate(steps):
        ahead = (
            number / warm if number < warm else 0.5 * (1 + math.cos(math.pi * (number - warm) / (len(steps) - warm)))
        )
        for group in optimizer.param_groups:
            group["lr"] = peak * ahead
        chosen = [pairs[i] for i in step]
        batch = padded_batch(chosen)
        ref_logps = torch.stack([reference[i] for i in step], dim=1).flatten()  # (2P,)
        loss = step_dpo_loss(
            logits_of(model, batch),
            batch["labels"],
            ref_logps,
            beta=BETA,
            label_smoothing=smoothing,
            weights=torch.tensor([pair.weight for pair in chosen]),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        history.append(loss.item())
    return history


def both_runs(model, pairs, config, make_optimizer, **options):
    """(losses, weights) of the trainer, then of the loop."""
    plain = copy.deepcopy(model)
    trainer = StepDPOTrainer(model, config, pairs)
    seen = watch(trainer)
    trainer.train()
    steps = steps_of(seen, config.pairs_per_step, len(pairs))
    history = plain_run(plain, pairs, steps, make_optimizer(plain.parameters()), **options)
    return (losses(trainer), weights(model)), (history, weights(plain))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of weights."""
    return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("share", ["tree", "pair", "none"])
def test_adamw_run_equals_a_loop_written_by_hand(tiny_model, pairs, config, kind, share):
    model = tiny_model(kind)
    start = weights(model)
    args = config(num_train_epochs=2, learning_rate=1e-3, share=share, warmup_steps=WARMUP)
    ours, plain = both_runs(model, pairs, args, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0))
    assert len(ours[0]) == 12
    assert ours[0] == pytest.approx(plain[0], abs=5e-6)
    assert max(ours[0]) - min(ours[0]) > 0.3  # something was learned
    assert distance(ours[1], plain[1]) < 2e-5 * distance(start, plain[1])


def test_sgd_run_equals_a_loop_written_by_hand(tiny_model, step_records, tiny_tokenizer, config, tmp_path):
    """With weights of the pairs, label smoothing and clipping, and an epoch whose last step is short."""
    records = step_records(5, 3)
    for number, record in enumerate(records):
        record["weight"] = (1.0, 0.25, 3.0, 0.0)[number % 4]
    pairs = make_pairs(records, tiny_tokenizer(), tmp_path)
    model = tiny_model()
    start = weights(model)
    args = config(
        num_train_epochs=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        label_smoothing=0.1,
        max_grad_norm=0.5,
    )
    ours, plain = both_runs(model, pairs, args, lambda p: torch.optim.SGD(p, lr=0.5), smoothing=0.1, clip=0.5)
    assert len(ours[0]) == 8
    assert ours[0] == pytest.approx(plain[0], abs=5e-6)
    assert distance(ours[1], plain[1]) < 1e-5 * distance(start, plain[1])
