"""Reference log-probs: one packed pass over all pairs, cached on disk.

A cache file belongs to a key: a hash over the reference's weights, the token ids of the pairs, how they are drawn and
packed, the precision and the versions of the libraries that computed it. Another model, tokenizer, dataset or version
makes another key, so a stale file is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import stepdpo_kernels
from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.trainer.progress import open_bar
from stepdpo_kernels.types import PackedBatch, StepPair

logger = logging.getLogger("stepdpo_kernels")

# Fields of a model's configuration that change nothing in its forward pass.
_NOT_THE_FUNCTION = (
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "dtype",
    "architectures",
    "quantization_config",
)


def default_cache_dir() -> Path:
    """`stepdpo_kernels/reference` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepdpo_kernels" / "reference"


def weights_fingerprint(model: nn.Module, *, with_adapter: bool = True) -> str:
    """sha256 over a model's configuration and the names, shapes, dtypes and bytes of its parameters and buffers.

    with_adapter: False leaves out the active adapter of a PEFT model
    """
    adapter: set[int] = set()
    # Rotary frequencies, windows and epsilons are in no weight.
    config = {k: v for k, v in causal_lm(model).config.to_dict().items() if k not in _NOT_THE_FUNCTION}
    if with_adapter and hasattr(model, "peft_config"):
        adapters: Any = model.peft_config
        config["adapters"] = {name: adapter.to_dict() for name, adapter in adapters.items()}
    if not with_adapter and hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        adapter = {t.data_ptr() for t in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() not in adapter:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def pairs_fingerprint(pairs: Sequence[StepPair]) -> str:
    """sha256 over token ids, groups (which packing follows) and weights of all pairs, in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (
            pair.prefix_ids.tobytes(),
            pair.chosen_ids.tobytes(),
            pair.rejected_ids.tobytes(),
            pair.group.encode(errors="surrogatepass"),
            struct.pack("<d", pair.weight),
        ):
            digest.update(struct.pack("<q", len(part)))
            digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _kernels() -> str:
    """What decides the order of sums beside shapes: the implementations in use, threads, and the device's own."""
    found = {
        "impl": os.environ.get("STEPDPO_IMPL", ""),
        "extension": find_spec("stepdpo_kernels._C") is not None,
        "attention": [name for name in ("flash_attn", "flash_attn_interface") if find_spec(name) is not None],
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return json.dumps(found, sort_keys=True)


def cache_key(model_fingerprint: str, pairs: Sequence[StepPair], **settings: Any) -> dict[str, str]:
    """What reference log-probs depend on, as the metadata of their cache file."""
    return {
        "model": model_fingerprint,
        "pairs": pairs_fingerprint(pairs),
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "kernels": _kernels(),
        "stepdpo_kernels": stepdpo_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def key_differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """In which ways a run that began with one key differs from one with another, in words; the devices do not count."""
    parts = [
        f"other {what}"
        for part, what in (("model", "weights of the reference"), ("pairs", "pairs"))
        if before.get(part) != now[part]
    ]
    old, new = (json.loads(key.get("settings", "{}")) for key in (before, now))
    parts += [
        f"{name} {old.get(name)} (now {new[name]})"
        for name in new
        if old.get(name) != new[name] and name not in ("device", "world")
    ]
    return parts


@torch.no_grad()
def compute_ref_logps(
    model: Any,
    num_pairs: int,
    steps: Iterable[list[PackedBatch]],
    logps_of: Callable[[Any, PackedBatch], Tensor],
    accelerator: Accelerator,
    *,
    progress: bool = True,
) -> Tensor:  # (N, 2)
    """Branch log-probs under the model as it is, chosen and rejected, float32; NaN for pairs in none of the steps.

    `steps` are those that the policy is going to see and `logps_of(model, batch)` (2P,) is its own forward: in the same
    forests the same weights give the same bits, so a policy that has not moved has margins of exactly zero. Each
    process computes its own steps, and all get all of the table.
    """
    device = accelerator.device
    table, seen = torch.zeros(num_pairs, 2, device=device), torch.zeros(num_pairs, 1, device=device)
    was_training = model.training
    model.eval()
    with open_bar(num_pairs, "reference log-probs: ", unit="pairs", disable=not progress) as bar:
        for batch in chain.from_iterable(steps):
            batch = batch.to(device)
            table[batch.pair_index] = logps_of(model, batch).view(2, -1).T.float()
            seen[batch.pair_index] = 1
            bar.update(batch.num_pairs * accelerator.num_processes)
    model.train(was_training)
    table, seen = accelerator.reduce((table, seen), reduction="sum")
    return (table / seen).cpu()


def load_or_compute(
    cache_dir: str | os.PathLike[str] | None,
    key: dict[str, str],
    compute: Callable[[], Tensor],
    accelerator: Accelerator,
) -> Tensor:
    """The cached table of a key, or `compute()` put there; the file appears whole or not at all.

    All processes compute, or none does. A folder that cannot be written costs the cache and no more.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:32]}.safetensors"
    table = _read(path, key)
    found = torch.tensor(float(table is not None), device=accelerator.device)
    found_by = accelerator.reduce(found, reduction="sum").item()
    if table is not None and found_by == accelerator.num_processes:
        return table
    table = compute()
    if accelerator.is_local_main_process:
        try:
            _write(path, key, table)
        except (OSError, SafetensorError) as error:
            logger.warning("reference log-probs could not be cached, so the next run computes them again: %s", error)
    return table


def _read(path: Path, key: dict[str, str]) -> Tensor | None:
    """The table in a cache file; None if there is none, or one that is damaged or has another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            table = file.get_tensor("ref_logps")
            return table if file.metadata() == key | {"checksum": _checksum(table)} else None
    except (OSError, SafetensorError):
        return None


def _write(path: Path, key: dict[str, str], table: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({"ref_logps": table}, temporary, metadata=key | {"checksum": _checksum(table)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(table: Tensor) -> str:
    return hashlib.sha256(_bytes(table)).hexdigest()
