"""Batched generation: the model's continuations of many texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from examples.miniature.progress import Progress, silent
from examples.miniature.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEP_TOKENS = 13  # of the longest step with its marker


def solution_tokens(settings: Settings) -> int:
    """Enough for every well-formed solution: its steps, its answer, its end."""
    return STEP_TOKENS * (settings.chain + 1)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 500,
    progress: Progress = silent,
) -> list[str]:
    """One continuation of each text, in order, up to where the model ends it; greedy at temperature 0.

    Draws from torch's own generator.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    encoded = tokenizer(list(texts))["input_ids"]
    # Neighbours of one length need no padding.
    order = sorted(range(len(texts)), key=lambda i: (len(encoded[i]), i))
    completions = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt")
        output = model.generate(
            **batch,
            **(sampling or {"do_sample": False}),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            completions[i] = text
        progress(start + len(rows), len(order), "")
    return completions
