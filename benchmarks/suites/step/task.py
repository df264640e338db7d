"""What a process does for a provider of the `step` suite's models: forward and backward of pairs, and no optimiser."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lengths import branching, draw_lengths, pairs_of
from benchmarks.registry import Case, Task
from benchmarks.suites.step.floor import LinearProducts
from benchmarks.suites.step.models import SIZES, WORDS, random_model
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import head_options, packed_forward
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import StepPair

BETA = 0.4
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of a whole model's gradient; a wrong formula is off by far more
UNLIMITED = 10**9
SMALL = {"model": "tiny", "lengths": "real", "pairs": 6, "max_tokens": 1200}


def prepare(case: Case, folder: Path) -> None:
    """Nothing: each process makes its weights and pairs from seeds."""


def tolerance(case: Case) -> float:
    return TOLERANCE[case["dtype"]]


def needs(provider: str, case: Case) -> int:
    """Weights, gradients, and the logits of a padded batch."""
    hidden, intermediate, layers, _, _, vocabulary, tied = SIZES[case["model"]]
    parameters = layers * (4 * hidden * hidden + 3 * hidden * intermediate) + (1 if tied else 2) * vocabulary * hidden
    logits = 10 * longest(case) * vocabulary if provider == "padded" else 0
    return 2 * parameters * getattr(torch, case["dtype"]).itemsize + logits


def longest(case: Case) -> int:
    """Tokens of a padded batch: the budget, or a pair that exceeds it."""
    return max(case["max_tokens"], 2 * max(len(p.prefix_ids) + len(p.rejected_ids) for p in pairs(case)))


def pairs(case: Case) -> list[StepPair]:
    if case["lengths"] == "real":
        lengths = draw_lengths(case["pairs"])
    else:
        lengths = branching(
            case["pairs"] // case["pairs_per_prefix"], case["prefix"], case["branch"], case["pairs_per_prefix"]
        )
    return pairs_of(lengths, WORDS)


def model_of(case: Case) -> Any:
    model = random_model(case["model"], case["dtype"], case["device"]).train()
    if case["mode"] == "lora":
        model = with_adapter(model)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def with_adapter(model: Any) -> Any:
    """Rank 16 on every linear layer but the head, the second factor not zero so that both have gradients."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter.init_lora_weights = False
    return get_peft_model(model, adapter)


class Pairs:
    """Forward and backward of all pairs of a case; gradients stay and add up."""

    note = ""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.pairs = case, model_of(case), pairs(case)
        self.head = self.model.get_output_embeddings()
        unique = pack_pairs(self.pairs, UNLIMITED)[0]
        self.facts: dict[str, float] = {"unique_tokens": unique.num_tokens, "pairs": len(self.pairs)}

    def count(self, tokens: int) -> None:
        """tokens: encoded ones, padding among them"""
        self.facts |= {"tokens": tokens, "of_unique": tokens / self.facts["unique_tokens"]}

    def losses(self) -> list[Tensor]:
        """Of each batch, its gradient taken; their sum is the mean over all pairs."""
        raise NotImplementedError

    def run(self) -> float:
        return float(torch.stack(self.losses()).sum())

    def value(self, outputs: float) -> float:
        return outputs

    def errors(self, outputs: float) -> dict[str, float]:
        return {}


class Packed(Pairs):
    def __init__(self, case: Case, share: str) -> None:
        super().__init__(case)
        self.loss = StepDPOLoss(beta=BETA, **head_options(self.model))
        self.batches = [b.to(case["device"]) for b in pack_pairs(self.pairs, case["max_tokens"], share=share)]
        self.count(sum(batch.num_tokens for batch in self.batches))

    def losses(self) -> list[Tensor]:
        found = []
        for batch in self.batches:
            reference = torch.zeros(2 * batch.num_pairs, device=batch.input_ids.device)
            hidden = packed_forward(self.model, batch)
            loss = self.loss.packed(hidden, self.head.weight, batch, reference, num_pairs=len(self.pairs)).loss
            loss.backward()
            found.append(loss.detach())
        return found


class Padded(Pairs):
    """Branches padded to the longest of a batch, chosen first; pairs sorted by length, as many as fill the budget."""

    def __init__(self, case: Case, rows_only: bool) -> None:
        super().__init__(case)
        self.rows_only = rows_only
        branches = [
            [(p.prefix_ids.tolist(), step.tolist()) for step in (p.chosen_ids, p.rejected_ids)]
            for p in sorted(self.pairs, key=longer)
        ]
        groups: list[list[Any]] = [[]]
        for pair in branches:
            length = max(len(prefix) + len(step) for prefix, step in pair)  # the longest so far
            if groups[-1] and 2 * (len(groups[-1]) + 1) * length > case["max_tokens"]:
                groups.append([])
            groups[-1].append(pair)
        self.batches = [self.batch(group) for group in groups]
        self.count(sum(ids.numel() for ids, *_ in self.batches))

    def batch(self, group: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, labels) each (2P, L), labels shifted: those of the next token, -100 where it is no step's."""
        branches = [pair[side] for side in (0, 1) for pair in group]
        length = max(len(prefix) + len(step) for prefix, step in branches)
        ids = torch.zeros(len(branches), length, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prefix, step) in enumerate(branches):
            end = len(prefix) + len(step)
            ids[row, :end] = torch.tensor(prefix + step)
            mask[row, :end] = 1
            labels[row, len(prefix) - 1 : end - 1] = torch.tensor(step, dtype=torch.int64)
        device = self.case["device"]
        return ids.to(device), mask.to(device), labels.to(device)

    def losses(self) -> list[Tensor]:
        found = []
        for ids, mask, labels in self.batches:
            wanted = labels != -100
            if self.rows_only:
                backbone = self.model.get_base_model().model if self.case["mode"] == "lora" else self.model.model
                hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                logits = F.linear(hidden[wanted], self.head.weight)
                logps = torch.zeros(labels.shape, device=ids.device)
                logps[wanted] = -F.cross_entropy(logits.float(), labels[wanted], reduction="none")
            else:
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
                logps = -flat.view(labels.shape)
            chosen, rejected = logps.sum(dim=1).chunk(2)
            loss = F.softplus(-BETA * (chosen - rejected)).sum() / len(self.pairs)
            loss.backward()
            found.append(loss.detach())
        return found


def longer(pair: StepPair) -> int:
    return len(pair.prefix_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


class Products:
    """Products of every linear layer, forward and backward, over the unique tokens, and of the head over its rows."""

    note = ""

    def __init__(self, case: Case) -> None:
        self.sizes = [(b.num_tokens, b.num_rows) for b in pack_pairs(pairs(case), case["max_tokens"])]
        self.floor = LinearProducts(random_model(case["model"], case["dtype"], case["device"]), self.sizes)
        self.products = 2 if case["mode"] == "lora" else 3
        self.facts = {"tokens": float(sum(tokens for tokens, _ in self.sizes))}

    def run(self) -> None:
        for tokens, rows in self.sizes:
            self.floor.run(tokens, rows, self.products)

    def value(self, outputs: None) -> None:
        return None

    def errors(self, outputs: None) -> dict[str, float]:
        return {}


PROVIDERS: dict[str, Callable[[Case], Task]] = {
    "products": Products,
    "ours": lambda case: Packed(case, "tree"),
    "ours-pair": lambda case: Packed(case, "pair"),
    "ours-none": lambda case: Packed(case, "none"),
    "padded": lambda case: Padded(case, rows_only=False),
    "padded-rows": lambda case: Padded(case, rows_only=True),
}


def load(provider: str, case: Case, folder: Path) -> Task:
    return PROVIDERS[provider](case)


def errors(provider: str, case: Case) -> dict[str, float]:
    """Of the loss and of all gradients together, on the tiny model, relative to float64 and one branch at a time."""
    if provider == "products":
        return {}
    small = {**case, **SMALL}
    task: Any = load(provider, small, Path())
    true_loss, true_gradients = oracle(task)
    loss = task.run()
    of = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    same = of.keys() == true_gradients.keys()
    difference = sum((of[name].double() - true_gradients[name]).square().sum() for name in of if same)
    length = sum(g.square().sum() for g in true_gradients.values())
    return {
        "error": abs(loss - true_loss) / true_loss,
        "error_gradient": float((difference / length) ** 0.5) if same else math.inf,
    }


def oracle(task: Pairs) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the definition: each branch alone, full logits, in float64."""
    import copy

    model = copy.deepcopy(task.model).double().train()
    total = 0.0
    for pair in task.pairs:
        margin: Any = 0.0
        for step, sign in ((pair.chosen_ids, 1), (pair.rejected_ids, -1)):
            ids = torch.tensor([*pair.prefix_ids.tolist(), *step.tolist()], device=task.case["device"])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            logps = logits.log_softmax(dim=1).gather(1, ids[1:, None])[:, 0]
            margin = margin + sign * logps[len(pair.prefix_ids) - 1 :].sum()
        loss = F.softplus(-BETA * margin) / len(task.pairs)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
