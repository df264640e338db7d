"""A model and step pairs for benchmarks where none are named: random weights, made-up words, realistic lengths.

Lengths follow what was measured on 1,534 pairs of real model errors on 563 grade-school problems (SmolLM2's tokens and
chat template): prefixes of 131 tokens in the mean, right steps of 25, wrong steps of 25, 2.7 pairs a problem.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 8192  # every made-up word is one token, so that lengths in words are lengths in tokens
PROBLEM = (60, 130)  # words of a problem, uniform
STEP = (8, 42)  # words of a step, uniform


def synthetic(folder: Path, seed: int = 0, problems: int = 400) -> tuple[str, str]:
    """Writes a 21-million-parameter Llama, its tokenizer and pairs in the released schema; returns both paths."""
    model_dir, data = folder / "model", folder / "pairs.jsonl"
    vocabulary = {"<unk>": 0, "<eos>": 1, "<user>": 2, "<assistant>": 3}
    vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<assistant> "
    tokenizer.save_pretrained(model_dir)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(model_dir)
    random_ = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{random_.randrange(WORDS)}" for _ in range(random_.randint(low, high)))

    with data.open("w") as file:
        for problem in range(problems):
            prompt, steps = words(*PROBLEM), [words(*STEP) for _ in range(4)]
            for _ in range(random_.choice((1, 2, 3, 3, 4))):
                done = random_.randrange(4)  # steps before the one in question
                record = {
                    "prompt": prompt,
                    "initial_reason_steps": " ".join(f"w{k} {step}" for k, step in enumerate(steps[:done]))
                    + f" w{done}",
                    "chosen": " " + steps[done],
                    "rejected": " " + words(*STEP),
                    "answer": str(problem),
                }
                file.write(json.dumps(record) + "\n")
    return str(model_dir), str(data)
