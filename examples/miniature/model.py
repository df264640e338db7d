"""A tokenizer of a few dozen tokens and a Qwen2 model of half a million weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from examples.miniature.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

PAD, EOS = "<|pad|>", "<|endoftext|>"
MAX_LENGTH = 256

# Byte-pair encoding writes a space as Ġ and a newline as Ċ.
# Earlier merges win, so ĠStep stands before Step.
WORDS = ("Compute", ":Ċ", "ĠStep", "Step", "Ġadding", "Ġtaking", "Ġgives", "ĠAnswer")
CHARACTERS = "0123456789Ġ+-=:."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of WORDS and CHARACTERS, in the pieces that Qwen2's tokenizer cuts a text into.

    It is a Qwen2Tokenizer, because that is what AutoTokenizer makes of any tokenizer that lies beside a Qwen2 model.
    """
    from transformers import Qwen2Tokenizer

    letters = dict.fromkeys(CHARACTERS + "".join(WORDS))
    # Every merge extends the beginning of a word.
    merges = dict.fromkeys((word[:end], word[end]) for word in WORDS for end in range(1, len(word)))
    tokens = dict.fromkeys((PAD, EOS, *letters, *(left + right for left, right in merges)))
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges),
        unk_token=None,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Fresh weights, drawn with torch's own generator."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    return Qwen2ForCausalLM(config)
