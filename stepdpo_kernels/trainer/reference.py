"""Reference log-probs: one packed pass over all pairs, cached on disk.

A cache file belongs to a key: a hash over the reference's weights, the token ids of the pairs, how they are drawn and
packed, the precision and the versions of the libraries that computed it. Another model, tokenizer, dataset or version
makes another key, so a stale file is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import stepdpo_kernels
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import causal_lm, packed_forward
from stepdpo_kernels.types import PackedBatch, StepPair


def default_cache_dir() -> Path:
    """`stepdpo_kernels/reference` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepdpo_kernels" / "reference"


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pairs_fingerprint(pairs: Sequence[StepPair]) -> str:
    """sha256 over the token ids of all pairs, in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prefix_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(ids.size.to_bytes(8, "little"))
            digest.update(ids.tobytes())
    return digest.hexdigest()


def cache_key(model: nn.Module, pairs: Sequence[StepPair], **settings: Any) -> dict[str, str]:
    """What reference log-probs depend on, as the metadata of their cache file."""
    return {
        "model": weights_fingerprint(model),
        "pairs": pairs_fingerprint(pairs),
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "stepdpo_kernels": stepdpo_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@torch.no_grad()
def compute_ref_logps(
    model: Any,
    num_pairs: int,
    steps: Iterable[list[PackedBatch]],
    loss: StepDPOLoss,
    accelerator: Accelerator,
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Tensor:  # (N, 2)
    """Branch log-probs under the model as it is, chosen and rejected, float32; NaN for pairs in none of the steps.

    `steps` are those that the policy is going to see: in the same forests the same weights give the same bits, so a
    policy that has not moved has margins of exactly zero. Each process computes its own steps; the tables are
    combined (a pair that two processes had gets the mean).
    """
    device = accelerator.device
    head = causal_lm(model).get_output_embeddings()
    table, seen = torch.zeros(num_pairs, 2, device=device), torch.zeros(num_pairs, 1, device=device)
    was_training = model.training
    model.eval()
    with (
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        tqdm(total=num_pairs, desc="reference log-probs", unit="pair", disable=not progress) as bar,
    ):
        for batch in chain.from_iterable(steps):
            logps = loss.packed_logps(packed_forward(model, batch), head.weight, batch, bias=head.bias)
            table[batch.pair_index] = logps.view(2, -1).T.float()
            seen[batch.pair_index] = 1
            bar.update(batch.num_pairs * accelerator.num_processes)
    model.train(was_training)
    table, seen = accelerator.reduce((table, seen), reduction="sum")
    return (table / seen).cpu()


def load_or_compute(
    cache_dir: str | os.PathLike[str] | None, key: dict[str, str], compute: Callable[[], Tensor]
) -> Tensor:
    """The cached table of a key, or `compute()` put there; the file appears whole or not at all."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:32]}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() == key:
                    return file.get_tensor("ref_logps")
        except SafetensorError:
            pass  # a file that is not whole: computed again and replaced
    table = compute()
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        save_file({"ref_logps": table}, temporary, metadata=key)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return table
