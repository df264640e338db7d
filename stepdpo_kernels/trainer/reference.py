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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import stepdpo_kernels
from stepdpo_kernels._bars import open_bar
from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.trainer.sharding import whole
from stepdpo_kernels.types import PackedBatch, StepPair

logger = logging.getLogger("stepdpo_kernels")

SAVE_SECONDS = 60.0  # between two writings of a table that is not complete

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
    state = model.state_dict(keep_vars=True)
    # Rotary frequencies, windows and epsilons are in no weight.
    config = {k: v for k, v in causal_lm(model).config.to_dict().items() if k not in _NOT_THE_FUNCTION}
    if with_adapter and hasattr(model, "peft_config"):
        adapters: Any = model.peft_config
        config["adapters"] = {name: adapter.to_dict() for name, adapter in adapters.items()}
    if not with_adapter and hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        own = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
        adapter = {_identity(tensor) for tensor in own.values()}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.items()):
        if _identity(tensor) not in adapter:
            with whole(tensor) as all_of_it:
                digest.update(f"{name} {tuple(all_of_it.shape)} {all_of_it.dtype}\n".encode())
                digest.update(_bytes(all_of_it))
    return digest.hexdigest()


def frozen(model: Any, *, copied: bool) -> Any:
    """A model, or a copy of it with weights of its own, for reading alone."""
    return (deepcopy(model) if copied else model).requires_grad_(False).eval()


def _identity(tensor: Tensor) -> int:
    return tensor.data_ptr() or id(tensor)  # ZeRO-3 leaves no data in a sharded parameter


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


def _kernels() -> dict[str, Any]:
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
    return found


def cache_key(
    model_fingerprint: str, pairs: Sequence[StepPair], run_by: Mapping[str, Any], **settings: Any
) -> dict[str, str]:
    """What reference log-probs depend on, as the metadata of their cache file.

    run_by: what runs the layers; like the device it decides bits and no more, so that a run may go on under another
    """
    return {
        "model": model_fingerprint,
        "pairs": pairs_fingerprint(pairs),
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "kernels": json.dumps(_kernels() | dict(run_by), sort_keys=True),
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
    batches: Iterable[tuple[PackedBatch, bool]],
    logps_of: Callable[[Any, PackedBatch], Tensor],
    accelerator: Accelerator,
    *,
    progress: bool = True,
    partial: PartialTable | None = None,
) -> Tensor:  # (N, 2)
    """Branch log-probs under the model as it is, chosen and rejected, float32; NaN for pairs in none of the steps.

    `batches` are those of the steps that the policy is going to see, and whether they count (`equal_passes`), and
    `logps_of(model, batch)` (2P,) is its own forward: in the same forests the same weights give the same bits, so a
    policy that has not moved has margins of exactly zero. Each process computes its own steps, and all get all of the
    table. `partial` keeps what there is now and then, and a pass that was stopped goes on from there.
    """
    device = accelerator.device
    table, seen, done = torch.zeros(num_pairs, 2, device=device), torch.zeros(num_pairs, 1, device=device), 0
    if partial is not None:
        table, seen, done = partial.load(table, seen, accelerator)
    was_training = model.training
    model.eval()
    with open_bar(num_pairs, "reference log-probs: ", unit="pairs", disable=not progress) as bar:
        for number, (batch, counts) in enumerate(batches):
            if number >= done:
                batch = batch.to(device, non_blocking=device.type == "cuda")
                logps = logps_of(model, batch).view(2, -1).T.float()
                if counts:
                    table[batch.pair_index] = logps
                    seen[batch.pair_index] = 1
                if partial is not None:
                    partial.save(table, seen, number + 1)
            if counts:
                bar.update(batch.num_pairs * accelerator.num_processes)
    model.train(was_training)
    table, seen = accelerator.reduce((table, seen), reduction="sum")
    return (table / seen).cpu()


def load_or_compute(
    cache_dir: str | os.PathLike[str] | None,
    key: dict[str, str],
    compute: Callable[[PartialTable], Tensor],
    accelerator: Accelerator,
) -> Tensor:
    """The cached table of a key, or `compute(partial)` put there; the file appears whole or not at all.

    All processes compute, or none does. A folder that cannot be written costs the cache and no more.
    """
    path = _cache_path(cache_dir, key)
    table = _read_table(path, key)
    found = torch.tensor(float(table is not None), device=accelerator.device)
    found_by = accelerator.reduce(found, reduction="sum").item()
    if table is not None and found_by == accelerator.num_processes:
        return table
    partial = PartialTable(path, key, accelerator)
    table = compute(partial)
    if accelerator.is_local_main_process:
        try:
            _write(path, key, ref_logps=table)
        except (OSError, SafetensorError) as error:
            logger.warning("reference log-probs could not be cached, so the next run computes them again: %s", error)
    partial.remove()
    return table


class PartialTable:
    """What a process has of a table that is being computed, in a file of its own beside the table's, once a minute.

    Written at most every SAVE_SECONDS; of damage or of another key nothing is read.
    """

    def __init__(self, path: Path, key: dict[str, str], accelerator: Accelerator) -> None:
        part = f"{accelerator.process_index}of{accelerator.num_processes}"
        self.path, self.key = path.with_suffix(f".{part}.part"), key | {"part": part}
        self._written = time.monotonic()

    def load(self, table: Tensor, seen: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor, int]:
        """(N, 2) log-probs, (N, 1) which of them are there, and how many passes need not be made, the same for all."""
        found = _read(self.path, self.key, "table", "seen", "passes")
        passes = torch.tensor(0 if found is None else int(found[2]), device=accelerator.device)
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(passes, op=torch.distributed.ReduceOp.MIN)
        if found is None or not passes:
            return table, seen, 0
        if accelerator.is_main_process:
            logger.info("reference log-probs: going on after %d forward passes", int(passes))
        return found[0].to(table.device), found[1].to(seen.device), int(passes)

    def save(self, table: Tensor, seen: Tensor, passes: int) -> None:
        if time.monotonic() - self._written < SAVE_SECONDS:
            return
        self._written = time.monotonic()
        # One that cannot be written is one that is not there; the table itself says so at the end.
        with suppress(OSError, SafetensorError):
            _write(self.path, self.key, table=table.cpu(), seen=seen.cpu(), passes=torch.tensor(passes))

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def cached_table(cache_dir: str | os.PathLike[str] | None, key: dict[str, str]) -> Tensor | None:
    """The cached table of a key; None where there is none that can be used."""
    return _read_table(_cache_path(cache_dir, key), key)


def _cache_path(cache_dir: str | os.PathLike[str] | None, key: dict[str, str]) -> Path:
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:32]}.safetensors"


def _read_table(path: Path, key: dict[str, str]) -> Tensor | None:
    found = _read(path, key, "ref_logps")
    return None if found is None else found[0]


def _read(path: Path, key: dict[str, str], *names: str) -> list[Tensor] | None:
    """Tensors of a cache file; None if there is none, or one that is damaged or has another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in names]
            return tensors if file.metadata() == key | {"checksum": _checksum(*tensors)} else None
    except (OSError, SafetensorError):
        return None


def _write(path: Path, key: dict[str, str], **tensors: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=key | {"checksum": _checksum(*tensors.values())})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()
