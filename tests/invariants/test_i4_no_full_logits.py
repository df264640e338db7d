"""I4, no full logits: what the head needs beside its inputs and gradients is a few chunks, whatever R and V.

Measured two ways: every allocation that goes through torch's dispatcher, and the resident memory of a fresh process,
which also sees what kernels allocate by themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.ops.linear_logprob import chunked, linear_logprob
from stepdpo_kernels.packing import build_batch
from tests.allocations import Allocations
from tests.forests import make_pair

CHUNK = chunked.CHUNK_BYTES
# Logits, what becomes of them in the two backward products, and copies of parts of X and W.
CHUNKS = 4


def _inputs(rows: int, vocabulary: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,))


def _peak(function: Callable[[], Tensor]) -> Allocations:
    """Allocations of forward and backward."""
    with Allocations() as allocations:
        function().sum().backward()
    return allocations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(512, 60_000), (12_000, 3000)], ids=["wide", "tall"])
def test_peak_of_the_chunked_head(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    hidden, weight, target = _inputs(rows, vocabulary, 16, dtype)
    allocations = _peak(lambda: linear_logprob(hidden, weight, target, impl="chunked"))
    # float32 sums of both gradients, and the gradients
    gradients = sum(x.numel() * (4 + x.element_size()) for x in (hidden, weight))
    logits = 4 * rows * vocabulary
    allowed = CHUNKS * CHUNK + gradients
    assert allowed < 0.75 * logits  # or this would allow what it is to forbid
    assert allocations.peak <= allowed
    assert allocations.largest <= CHUNK


@pytest.mark.parametrize("impl", ["chunked", "auto"])
def test_a_few_rows_do_not_cast_the_whole_weight(impl: str) -> None:
    # 4 rows of logits are next to nothing, and a float32 copy of W would be twice W
    hidden, weight, target = _inputs(4, 60_000, 512, torch.bfloat16)
    weight.requires_grad_(False)
    assert 4 * weight.numel() > 1.5 * CHUNKS * CHUNK
    allocations = _peak(lambda: linear_logprob(hidden, weight, target, impl=impl))
    assert allocations.largest <= CHUNK
    assert allocations.peak <= CHUNKS * CHUNK


def test_more_rows_or_columns_need_no_more() -> None:
    peaks = {}
    for rows, vocabulary in ((512, 30_000), (512, 60_000), (1024, 60_000)):
        hidden, weight, target = _inputs(rows, vocabulary, 8, torch.float32)
        gradients = hidden.nbytes + weight.nbytes
        peaks[rows, vocabulary] = _peak(lambda: linear_logprob(hidden, weight, target, impl="chunked")).peak - gradients  # noqa: B023
    least, most = min(peaks.values()), max(peaks.values())
    assert most < 1.25 * least


def test_the_reference_is_caught() -> None:
    # the measurement measures: the twin that holds full logits is seen to
    hidden, weight, target = _inputs(512, 30_000, 8, torch.float32)
    assert _peak(lambda: linear_logprob(hidden, weight, target, impl="reference")).peak >= 2 * 4 * 512 * 30_000


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_peak_of_the_loss(layout: str) -> None:
    vocabulary, size, pairs = 60_000, 16, 4
    tokens = torch.randint(vocabulary, (pairs, 3, 64)).numpy()
    batch = build_batch([make_pair(*t) for t in tokens], range(pairs), "pair")
    weight = torch.randn(vocabulary, size, requires_grad=True)
    loss_fn = StepDPOLoss(reference_free=True, impl="chunked")
    if layout == "packed":
        hidden = torch.randn(batch.num_tokens, size, requires_grad=True)
        allocations = _peak(lambda: loss_fn.packed(hidden, weight, batch).loss)
    else:
        hidden = torch.randn(2 * pairs, 128, size, requires_grad=True)
        labels = torch.full((2 * pairs, 128), -100)
        labels[:, 63:127] = torch.randint(vocabulary, (2 * pairs, 64))
        allocations = _peak(lambda: loss_fn(hidden, weight, labels).loss)
    logits = 4 * batch.num_rows * vocabulary
    allowed = CHUNKS * CHUNK + 2 * (hidden.nbytes + weight.nbytes)
    assert allowed < 0.75 * logits
    assert allocations.peak <= allowed


_MEASURE = """
import sys, torch
from stepdpo_kernels import StepDPOLoss, linear_logprob
rows, vocabulary, size, impl, dtype = *map(int, sys.argv[1:4]), sys.argv[4], getattr(torch, sys.argv[5])
torch.set_num_threads(2)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
def inputs(rows, vocabulary):
    hidden, weight = (torch.randn(n, size).to(dtype).requires_grad_() for n in (rows, vocabulary))
    return hidden, weight, torch.randint(vocabulary, (rows,))
def step(hidden, weight, target):
    branches = hidden.unflatten(0, (-1, 32)), weight, target.unflatten(0, (-1, 32))
    loss_fn = StepDPOLoss(reference_free=True, impl=impl)
    if sys.argv[6] == "loss":
        loss_fn(*branches).loss.backward()
    elif sys.argv[6] == "loss twice":
        loss = loss_fn(*branches).loss
        torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        loss.backward()
    elif sys.argv[6] == "sums":
        loss_fn.logps(*branches).sum().backward()
    else:
        linear_logprob(hidden, weight, target, impl=impl).sum().backward()
step(*inputs(64, 2000))  # what libraries set up once
arguments = inputs(rows, vocabulary)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
step(*arguments)
print(status("VmHWM") - before)
"""


def _resident(rows: int, vocabulary: int, size: int, impl: str, dtype: str, what: str) -> int:
    """Bytes by which a fresh process grows at most during one forward and backward."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs of Linux")
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, (rows, vocabulary, size)), impl, dtype, what],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.parametrize(
    ("impl", "dtype", "size", "what"),
    [
        ("auto", "float32", 32, "log-probs"),
        ("auto", "bfloat16", 32, "log-probs"),
        ("chunked", "bfloat16", 32, "log-probs"),
        ("auto", "bfloat16", 128, "loss"),  # takes gradients in forward, 128 rows at a time
        ("auto", "bfloat16", 128, "loss twice"),
        ("auto", "bfloat16", 128, "sums"),
    ],
)
def test_resident_memory_of_a_fresh_process(impl: str, dtype: str, size: int, what: str) -> None:
    rows, vocabulary = 4096, 40_000
    grown = _resident(rows, vocabulary, size, impl, dtype, what)
    logits = 4 * rows * vocabulary
    # both gradients in float32 and in the dtype, twice; an implementation may keep as much as a float32 dW
    gradients = (rows + vocabulary) * size * (4 + 4)
    allowed = (CHUNKS + 2) * CHUNK + (2 if size == 32 else 1) * gradients
    assert allowed < logits / 4
    assert grown <= allowed, f"{grown / 2**20:.0f} MiB; full logits are {logits / 2**20:.0f} MiB"
