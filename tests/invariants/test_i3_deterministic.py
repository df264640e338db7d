"""I3, determinism: the same step twice gives the same bits, loss and every gradient.

On two threads, in one process or in another; no sum depends on which thread comes first.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stepdpo_kernels.packing import pack_pairs
from tests.exactness import MODELS, Step, packed_step
from tests.families import FAMILIES
from tests.forests import forest_pairs

Make = Callable[..., PreTrainedModel]


def _step(make: Callable[[], PreTrainedModel], share: str = "tree", impl: str = "auto") -> Step:
    pairs = forest_pairs()
    refs = -40 + torch.arange(2.0 * len(pairs))
    return packed_step(make(), pack_pairs(pairs, 150, share=share), refs, num_pairs=len(pairs), impl=impl)


def _assert_same_bits(a: Step, b: Step) -> None:
    assert a.loss == b.loss
    assert set(a.gradients) == set(b.gradients)
    for name in a.gradients:
        assert torch.equal(a.gradients[name], b.gradients[name]), name


@pytest.fixture(autouse=True)
def _two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)  # _one_thread puts it back


@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("qwen2 tied", torch.float32),
        ("qwen2 sliding", torch.bfloat16),
    ],
    ids=str,
)
def test_twice_the_same(tiny_model: Make, which: str, dtype: torch.dtype) -> None:
    kind, config = MODELS[which]
    first, second = (_step(lambda: tiny_model(kind, dtype=dtype, **config).train()) for _ in range(2))
    _assert_same_bits(first, second)


@pytest.mark.parametrize(("impl", "share"), [("chunked", "tree"), ("reference", "tree"), ("auto", "pair")])
def test_each_implementation(tiny_model: Make, impl: str, share: str) -> None:
    first, second, third = (_step(tiny_model, share, impl) for _ in range(3))
    _assert_same_bits(first, second)
    _assert_same_bits(first, third)


def _digest(step: Step) -> str:
    digest = hashlib.sha256(repr(step.loss).encode())
    for name in sorted(step.gradients):
        digest.update(step.gradients[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digests(folder: Path | str) -> str:
    """Of a step in float32 and of one in bfloat16, by the model that a folder holds."""
    steps = (
        _step(lambda dtype=dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train())
        for dtype in (torch.float32, torch.bfloat16)
    )
    return "-".join(map(_digest, steps))


_ELSEWHERE = """
import sys, torch
from tests.invariants.test_i3_deterministic import _digests
torch.set_num_threads(2)
for folder in sys.argv[1:]:
    print(_digests(folder))
"""


@pytest.mark.parametrize("kinds", [["qwen2"], pytest.param([*FAMILIES], marks=pytest.mark.slow)], ids=["one", "every"])
def test_another_process_gets_the_same(tiny_model: Make, tmp_path: Path, kinds: list[str]) -> None:
    expected = []
    for kind in kinds:
        folder = tmp_path / kind
        tiny_model(kind, **FAMILIES[kind].config).save_pretrained(folder)
        # loaded here as there: MKL's sums for a single output depend on where in memory a weight begins
        expected.append(_digests(folder))
    run = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *(str(tmp_path / kind) for kind in kinds)],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert dict(zip(kinds, run.stdout.split()[-len(kinds) :], strict=True)) == dict(zip(kinds, expected, strict=True))
