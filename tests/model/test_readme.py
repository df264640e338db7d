"""What the README says of families is what the tests are made of, and what implementations take of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdpo_kernels.ops.tree_attention import cpu, triton_kernel
from tests.families import FAMILIES, attention_inputs, table

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_has_the_table() -> None:
    assert table() in README.read_text()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_cpu_takes_every_layer_of_every_family(kind: str) -> None:
    layers = attention_inputs(kind)
    assert len(layers) == 2
    assert [cpu.why_not(layer) for layer in layers] == [[], []]


@pytest.mark.parametrize("kind", FAMILIES)
def test_so_does_our_triton_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "INTERPRETED", True)  # the layers are on the CPU
    assert [triton_kernel.why_not(layer) for layer in attention_inputs(kind)] == [[], []]
