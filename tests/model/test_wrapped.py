"""A packed forward inside DistributedDataParallel and FSDP2, two processes (gloo, on the CPU): gradients as in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import enable_packed_forward, head_options
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import StepDPOError
from tests.exactness import Step, assert_exact, family_model, packed_step
from tests.families import tiny_model
from tests.forests import nested_pairs

torch.set_num_threads(1)
rank, store, wrapper, kind = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
training = "checkpointing" if wrapper == "fsdp" else "full"
# a problem for each process, and for this one all of them to compare with
pairs = [*nested_pairs(seed=0, group="a"), *nested_pairs(seed=1, group="b")[:5]]
own = pairs[:8] if rank == 0 else pairs[8:]
refs = -40 + torch.arange(2.0 * len(pairs))
expected = packed_step(
    family_model(tiny_model, kind, training), pack_pairs(pairs, 10_000), refs, num_pairs=len(pairs)
)

model = family_model(tiny_model, kind, training)
inner = model
loss_fn = StepDPOLoss(**head_options(model))
enable_packed_forward(model)
if wrapper == "ddp":
    model = DistributedDataParallel(model)
else:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
(batch,) = pack_pairs(own, 10_000)
at = batch.pair_index + (0 if rank == 0 else 8)
mine = torch.cat([refs[at], refs[len(pairs) + at]])
loss = model(
    packed_batch=batch,
    head=lambda hidden, head: loss_fn.packed(hidden, head.weight, batch, mine, num_pairs=len(pairs)).loss,
)
(2 * loss).backward()  # gradients are averaged over both
total = loss.detach().clone()
dist.all_reduce(total)
gradients = {name: p.grad for name, p in inner.named_parameters()}
if wrapper == "fsdp":
    assert any(g.to_local().shape != g.shape for g in gradients.values())
    gradients = {name: g.full_tensor() for name, g in gradients.items()}
assert_exact(Step(total.item(), gradients), expected)

if wrapper == "fsdp":  # processes would call layers, which gather weights, in different numbers
    enable_packed_forward(model, verify=True)
    try:
        model(packed_batch=batch, head=lambda hidden, head: hidden)
    except StepDPOError as error:
        assert "before its weights are sharded" in str(error), error
    else:
        raise AssertionError("not refused")
# gloo's own threads now and then abort a process that has done all its work and is exiting
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize(("wrapper", "kind"), [("ddp", "llama"), ("fsdp", "gemma2")])
def test_two_processes_get_the_gradients_of_one(tmp_path: Path, wrapper: str, kind: str) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rank), str(tmp_path / "store"), wrapper, kind],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
