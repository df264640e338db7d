"""Supervised fine-tuning from scratch on the corpus with the bad habit, cached by what made it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from examples.miniature.model import make_model, make_tokenizer
from examples.miniature.progress import Progress, silent
from examples.miniature.settings import Settings
from examples.miniature.task import Problem, habitual_solution, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

MADE_BY = "made_by.json"
WARMUP = 0.05
_SOURCES = ("task.py", "model.py", "sft.py")


def sft_model(
    folder: Path, settings: Settings, *, fresh: bool = False, progress: Progress = silent
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, bool]:
    """The fine-tuned model and its tokenizer from `folder`, trained and saved first unless it is there already.

    Third comes whether the folder had it. `fresh` trains it anyway.
    """
    wanted = made_by(settings)
    record = folder / MADE_BY
    cached = not fresh and record.is_file() and record.read_text() == wanted
    if not cached:
        tokenizer = make_tokenizer()
        model = _train(settings, tokenizer, progress)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record.write_text(wanted)  # last, so that what was not saved whole is trained again
    model, tokenizer = load(folder)
    return model, tokenizer, cached


def load(folder: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def sft_problems(settings: Settings) -> Iterator[Problem]:
    """Every problem of the corpus, in order."""
    return islice(problems("sft", settings.chain, settings.seed), settings.sft_steps * settings.sft_batch)


def made_by(settings: Settings) -> str:
    """All that the model depends on: its settings, the code that made it, the version of torch."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    keys = ("seed", "chain", "hidden_size", "layers", "heads", "sft_steps", "sft_batch", "sft_learning_rate")
    values = {key: getattr(settings, key) for key in keys}
    return json.dumps({**values, "code": digest.hexdigest(), "torch": str(torch.__version__)}, indent=1)


def _train(settings: Settings, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> Qwen2ForCausalLM:
    torch.manual_seed(settings.seed)
    model = make_model(settings, tokenizer).train()
    optimizers = _optimizers(model, settings.sft_learning_rate)
    schedules = [LambdaLR(optimizer, lambda step: _cosine(step / settings.sft_steps)) for optimizer in optimizers]
    random = Random(settings.seed)
    corpus = sft_problems(settings)
    for step in range(settings.sft_steps):
        batch = list(islice(corpus, settings.sft_batch))
        input_ids, labels = _tensors(batch, random, tokenizer)
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        keep = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[keep]), labels[:, 1:][keep])
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress(step + 1, settings.sft_steps, f"loss {loss.item():.3f}")
    return model


def _optimizers(model: Qwen2ForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for the rest: half the steps that AdamW alone needs here."""
    layers = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = set(map(id, layers))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [
        torch.optim.Muon(layers, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate),
    ]


def _cosine(done: float) -> float:
    """Factor of the learning rate after this part of the steps: linear warm-up, then cosine to 0."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def _tensors(
    batch: list[Problem], random: Random, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels (B, L), padded on the right; labels are -100 on the problem and the padding."""
    texts = [problem.prompt + habitual_solution(problem, random) + tokenizer.eos_token for problem in batch]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompts = [len(ids) for ids in tokenizer([problem.prompt for problem in batch])["input_ids"]]
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    columns = torch.arange(labels.shape[1])
    labels = labels.masked_fill(columns < torch.tensor(prompts)[:, None], -100)
    return encoded["input_ids"], labels
