"""A model and its tokenizer from a folder, a GGUF file or a hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stepdpo_kernels.types import StepDPOError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _gguf_of(path: str) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder that holds no transformers model."""
    place = Path(path)
    if place.is_file() and place.suffix == ".gguf":
        return place
    if place.is_dir() and not (place / "config.json").exists():
        found = sorted(place.glob("*.gguf"))
        if len(found) > 1:
            raise StepDPOError(f"model {path!r} holds {len(found)} GGUF files: name one, for example {found[0]}")
        if found:
            return found[0]
    return None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder, a GGUF file (or a folder with one) or a hub id.

    Raises StepDPOError for a place without one that can be read.
    """
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    gguf = _gguf_of(path)
    if gguf is not None:
        return _load(AutoTokenizer.from_pretrained, str(gguf.parent), "tokenizer", gguf_file=gguf.name)
    return _load(AutoTokenizer.from_pretrained, path, "tokenizer")


def load_model(path: str, dtype: str = "float32", *, load_in_4bit: bool = False) -> PreTrainedModel:
    """A causal language model for training: dense weights of the given dtype.

    dtype: "float32" (what an optimiser should update; compute in bfloat16 by `bf16=True`), "bfloat16" or "float16".
    load_in_4bit: linear layers but the head in 4 bits, for an adapter to be trained on (QLoRA, Dettmers et al. 2023,
        arXiv 2305.14314: NF4, quantised constants), multiplied in `dtype`; needs bitsandbytes
    A GGUF model is dequantised. Raises StepDPOError for an unknown dtype, for a place without a model that can be
    read, and for one that lacks some of its weights.
    """
    if dtype not in DTYPES:
        raise StepDPOError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    gguf = _gguf_of(path)
    if gguf is not None and load_in_4bit:
        raise StepDPOError(f"model {path!r}: a GGUF file cannot be loaded in 4 bits: name a transformers folder")
    if gguf is not None:
        from transformers.utils.quantization_config import GgufConfig

        return _load(
            AutoModelForCausalLM.from_pretrained,
            str(gguf.parent),
            "model",
            dtype=DTYPES[dtype],
            gguf_file=gguf.name,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
    options = {"quantization_config": _four_bits(DTYPES[dtype])} if load_in_4bit else {}
    model, info = _load(
        AutoModelForCausalLM.from_pretrained, path, "model", dtype=DTYPES[dtype], output_loading_info=True, **options
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise StepDPOError(
            f"model {path!r} lacks {len(missing)} of the weights of a {type(model).__name__}, which would begin at "
            f"random: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return model


def _four_bits(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )


def _load(from_pretrained: Callable[..., Any], path: str, what: str, **options: Any) -> Any:
    place = Path(path)
    looks_local = path.startswith((".", "/")) or path.count("/") > 1
    if looks_local and not place.exists():
        raise StepDPOError(f"{what} {path!r}: no such folder or file")
    if place.is_dir() and "gguf_file" not in options and not any(place.glob("*.json")):
        raise StepDPOError(f"{what} {path!r}: the folder holds no transformers {what} and no GGUF file")
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        where = "cannot be read" if place.exists() else "no such folder, and not to be had from the hub"
        raise StepDPOError(f"{what} {path!r}: {where}: {type(error).__name__}: {error}") from error
