"""The loops around StepDPOLoss: they learn, and all of them the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from accelerate.state import AcceleratorState

from examples.loss import accelerate_loop, bare
from tests.conftest import ROOT


@pytest.fixture
def run(monkeypatch) -> Callable[..., list[float]]:
    AcceleratorState._reset_state(reset_partial_state=True)  # or the precision of earlier tests' trainers stays

    def call(main: Callable[[], list[float]], *options: str) -> list[float]:
        monkeypatch.setattr(sys, "argv", ["example", *options])
        return main()

    return call


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of the loop without any framework."""
    before, sys.argv = sys.argv, ["example"]
    try:
        return bare.main()
    finally:
        sys.argv = before


def test_the_bare_loop_learns(losses, run):
    assert len(losses) == 3 * 4
    assert losses[:1] == pytest.approx([0.693147], abs=1e-6)
    assert sum(losses[8:]) / 4 < 0.5
    one_forest = run(bare.main, "--max-tokens", "10000")
    assert one_forest == pytest.approx(losses, rel=1e-4)


def test_accelerate_does_the_same(losses, run):
    assert run(accelerate_loop.main) == pytest.approx(losses, rel=1e-5)


def test_lightning_does_the_same(losses, run):
    pytest.importorskip("pytorch_lightning")
    from examples.loss import lightning_module

    assert run(lightning_module.main) == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_two_processes_do_the_same(losses, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        "from examples.loss.accelerate_loop import main\n"
        f"losses = main()\nopen(r'{tmp_path}/losses.json', 'w').write(json.dumps(losses))\n"
    )
    subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=300,
        capture_output=True,
    )
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-4)
