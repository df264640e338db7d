"""A model and its tokenizer from a folder, a GGUF file or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    """The tokenizer of a transformers folder, a GGUF file (or a folder with one) or a hub id."""
    gguf = _gguf_of(path)
    if gguf is not None:
        return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _check_folder(path, "tokenizer")
    return AutoTokenizer.from_pretrained(path)


def load_model(path: str, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model for training: dense weights of the given dtype.

    dtype: "float32" (what an optimiser should update; compute in bfloat16 by `bf16=True`), "bfloat16" or "float16".
    A GGUF model is dequantised. Raises StepDPOError for an unknown dtype or a folder without a model.
    """
    if dtype not in DTYPES:
        raise StepDPOError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    gguf = _gguf_of(path)
    if gguf is not None:
        from transformers.utils.quantization_config import GgufConfig

        options |= {
            "gguf_file": gguf.name,
            "quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True),
        }
        path = str(gguf.parent)
    else:
        _check_folder(path, "model")
    return AutoModelForCausalLM.from_pretrained(path, **options)


def _check_folder(path: str, what: str) -> None:
    place = Path(path)
    if place.is_dir() and not any(place.glob("*.json")):
        raise StepDPOError(f"{what} {path!r}: the folder holds no transformers {what} and no GGUF file")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not place.exists():
        raise StepDPOError(f"{what} {path!r}: no such folder or file")
