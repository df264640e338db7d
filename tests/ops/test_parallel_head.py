"""The head over a vocabulary that two processes share (gloo, on the CPU): as if one process had all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMON = """
import os, sys
import torch, torch.distributed as dist
from stepdpo_kernels import linear_logprob
from tests.numerics import assert_as_good_as_eager, eager_logprob, value_and_gradients
torch.set_num_threads(1)
rank, store, impl, dtype = int(sys.argv[1]), sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
R, D, V, CUT = 23, 37, 300, 171  # uneven parts
hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((R, D), (V, D), (V,)))
target, upstream = torch.randint(V, (R,)), torch.randn(R)
target[:4] = torch.tensor([0, CUT - 1, CUT, V - 1])
part = slice(0, CUT) if rank == 0 else slice(CUT, V)
"""

PLAIN = """
options = {"softcap": 5.0, "logit_scale": 1.3}
def whole(op):
    return lambda h, w, b: op(h, w, target, bias=b, **options)
def sharded(h, w, b):
    return linear_logprob(h, w, target, bias=b, group=dist.group.WORLD, vocab_start=part.start, impl=impl, **options)
ours = value_and_gradients(sharded, [hidden, weight[part], bias[part]], upstream)
eager = value_and_gradients(whole(eager_logprob), [hidden, weight, bias], upstream)
oracle = value_and_gradients(whole(eager_logprob), [hidden, weight, bias], upstream, torch.float64)
for results in (eager, oracle):
    results[2], results[3] = results[2][part], results[3][part]
for name, *of in zip(["log-probs", "dX", "dW", "db"], ours, eager, oracle, strict=True):
    assert_as_good_as_eager(name, *of, dtype)
both = [torch.empty_like(ours[1]) for _ in range(2)]
dist.all_gather(both, ours[1])
assert torch.equal(*both)
# a frozen weight: no gradient, and the same log-probs
with torch.no_grad():
    assert torch.equal(sharded(hidden, weight[part], bias[part]), ours[0])
"""

DTENSOR = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
mesh = init_device_mesh("cpu", (2,))
x = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
plain = [t.clone().requires_grad_() for t in (hidden, weight)]
expected = linear_logprob(*plain, target, impl="chunked")
gradients = torch.autograd.grad(expected, plain, upstream)
for placement in (Shard(0), Replicate()):
    w = distribute_tensor(weight, mesh, [placement]).requires_grad_()
    logps = linear_logprob(x, w, target, impl=impl)
    torch.testing.assert_close(logps, expected)
    for ours, theirs in zip(torch.autograd.grad(logps, [x, w], upstream), gradients, strict=True):
        assert isinstance(ours, DTensor)
        torch.testing.assert_close(ours.full_tensor(), theirs)
def refused(message, *arguments, **options):
    try:
        linear_logprob(*arguments, target, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("not refused: " + message)
sharded = distribute_tensor(weight, mesh, [Shard(0)])
refused("hidden must be a DTensor replicated", hidden, sharded)
refused("Shard(0) or Replicate()", x, distribute_tensor(weight, mesh, [Shard(1)]))
refused("bias must be one", x, sharded, bias=bias)
refused("it takes no sharded vocabulary", x, sharded, impl="reference")
refused("group and vocab_start go together", hidden, weight, vocab_start=0)
refused("lies in the vocabulary of 2 processes", hidden, weight, group=dist.group.WORLD, vocab_start=0)
refused("lies in the vocabulary of 0 processes", hidden, weight[:5], group=dist.group.WORLD, vocab_start=5 * rank)
"""


# gloo's own threads now and then abort a process that has done all its work and is exiting.
END = """
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def run_two(code: str, folder: Path, impl: str, dtype: str) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                COMMON + code + END,
                str(rank),
                str(folder / "store"),
                impl,
                dtype,
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["auto", "triton_fused"])
def test_a_sharded_vocabulary_is_as_good_as_eager(tmp_path: Path, impl: str, dtype: str) -> None:
    if impl == "triton_fused":
        pytest.importorskip("triton")
    run_two(PLAIN, tmp_path, impl, dtype)


def test_a_weight_that_is_a_dtensor(tmp_path: Path) -> None:
    run_two(DTENSOR, tmp_path, "auto", "float32")
