"""Models by their sizes, with random weights, and step pairs of made-up words: nothing to download.

Time and memory do not depend on what the weights are. Every word is one token: lengths in words are lengths in tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lengths import draw_lengths, pairs_of

WORDS = 8192
TEMPLATE = 2  # tokens of the chat template
SPECIAL = ("<unk>", "<eos>", "<user>", "<assistant>")
# hidden, intermediate, layers, heads, kv heads, vocabulary, whether the head is the embedding
SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (64, 160, 2, 4, 2, len(SPECIAL) + WORDS, False),
    "llama-21M": (512, 1376, 4, 8, 4, len(SPECIAL) + WORDS, False),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152, True),
    "Qwen2-0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen2-1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen2-7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}


def config(name: str) -> Any:
    """Of transformers: Llama or Qwen2."""
    from transformers import LlamaConfig, Qwen2Config

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[name]
    return (Qwen2Config if name.startswith("Qwen2") else LlamaConfig)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=65_536,
        tie_word_embeddings=tied,
        eos_token_id=1,
        bos_token_id=None,
    )


def random_model(name: str, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config(name), dtype=getattr(torch, dtype))


def write_model(folder: Path, name: str, dtype: str) -> None:
    """The model and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *(f"w{i}" for i in range(WORDS))))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<assistant> "
    tokenizer.save_pretrained(folder)
    random_model(name, dtype, "cpu").save_pretrained(folder)


def write_pairs(path: Path, pairs: int, seed: int = 0) -> None:
    """Records of the released schema whose pairs, in tokens, are those of `draw_lengths`."""

    def text(ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    lengths = draw_lengths(pairs, seed)
    with path.open("w") as file:
        for of, pair in zip(lengths, pairs_of(lengths, WORDS, seed), strict=True):
            prefix = pair.prefix_ids.tolist()
            problem = of.shortest - TEMPLATE - 1  # at least one word is of the steps before
            record = {
                "prompt": text(prefix[:problem]),
                "initial_reason_steps": text(prefix[problem : len(prefix) - TEMPLATE]),
                "chosen": f" {text(pair.chosen_ids.tolist())}",
                "rejected": f" {text(pair.rejected_ids.tolist())}",
                "answer": pair.group,
            }
            file.write(json.dumps(record) + "\n")
