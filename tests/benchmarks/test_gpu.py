"""`python -m benchmarks gpu`, without a GPU: all of it runs, in its dry form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, rows, tune
from benchmarks.registry import Case, workloads
from benchmarks.runner import Context
from benchmarks.suites.step import tiny, trainers

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_dry_form_walks_through_all_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry", "--time-limit", "900", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:]
    tests = json.loads((tmp_path / "gpu-tests.json").read_text())
    assert tests["status"] == 0
    found = {(row.workload, row.provider): row for row in rows.read(tmp_path) if row.metric == "seconds"}
    for workload in workloads():
        if workload.suite in gpu.SHARES:
            for name in workload.dry:
                row = found[workload.name, name]
                assert row.status in ("ok", "absent"), (workload.name, name, row.status, row.note)
                assert row.status == "ok" or not name.startswith("ours") or "extension" in row.note, row.note
    assert found["head-rows", "ours-triton-chunked"].status == "ok"  # in Triton's interpreter
    assert found["attention-prefix", "ours-triton"].status == "ok"
    told = (tmp_path / "README.md").read_text()
    assert "## Tests marked gpu" in told
    assert tests["summary"] in told


def test_what_time_leaves_of_the_tests_is_told(tmp_path: Path) -> None:
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time, pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    time.sleep(60)\n")
    told = gpu.run_tests(tmp_path, 4.0, str(slow))
    assert told["status"] == 1
    assert told["summary"].startswith("stopped after 4 s")
    red = tmp_path / "test_red.py"
    red.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    raise ValueError('no')\n")
    told = gpu.run_tests(tmp_path, 60.0, str(red))
    assert told["status"] == 1
    assert len(told["failed"]) == 1
    assert told["failed"][0].endswith("test_red.py::test_it")
    assert "1 failed" in told["summary"]


def test_each_suite_leaves_time_to_the_next() -> None:
    assert all(0 < share <= 1 for share in gpu.SHARES.values())
    assert 0 < gpu.TESTS_SHARE < 0.5
    left = 1 - gpu.TESTS_SHARE
    for share in list(gpu.SHARES.values())[:-1]:
        left *= 1 - share
    assert left > 0.15


@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_trainers_one_after_another(mode: str) -> None:
    """Those that would not fit into a GPU's memory together: the same rows as when they take turns."""
    if mode == "lora":
        pytest.importorskip("peft")
    kept: list[rows.Row] = []
    workload = next(w for w in workloads("step") if w.name == "step-training")
    of: Case = tiny("cpu", pairs_per_step=4, rounds=1, alone=True) | {"mode": mode}
    told = Context(device="cpu", rounds=1, keep=kept.extend, threads=1, only=("products", "ours"))
    trainers.measure(workload, [of], told)
    seconds = {row.provider: row for row in kept if row.metric == "seconds"}
    assert {name: (row.status, len(row.values)) for name, row in seconds.items()} == {
        "products": ("ok", 1),
        "ours": ("ok", 1),
    }
    metrics = {row.metric for row in kept if row.provider == "ours"}
    assert metrics >= {"reference_seconds", "training_seconds", "peak_bytes", "extra_bytes", "value", "of_floor"}
    assert {row.metric for row in kept if row.metric.startswith("error")} == {
        f"error_{name}" for name in trainers.LOGGED
    }


@pytest.mark.parametrize("name", list(tune.KERNELS))
def test_candidates_are_tried_and_taken_away_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In Triton's interpreter, whose tables are those of its own, so that attention's candidates need a GPU."""
    if name.startswith("attention"):
        with pytest.raises(KeyError):
            tune.KERNELS[name]("cpu", "float32").current()
        return
    pytest.importorskip("triton")
    before = tune.KERNELS[name]("cpu", "float32").current()
    tune.tune(name, "cpu", "float32", rounds=1, limit=2, left=lambda: 100.0)
    assert tune.KERNELS[name]("cpu", "float32").current() == before
    told = capsys.readouterr().out
    assert "of the one in use" in told
    assert told.count("float32") == 1
    assert "1.000" in told


def test_a_candidate_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    used: list[int] = []

    def kernel(device: str, dtype: str) -> tune.Kernel:
        from benchmarks.suites.head.providers import WAYS, Way
        from tests.benchmarks.faulty_worker import wrong_gradient

        right = WAYS["eager"]

        def put(config: int) -> None:
            used[:] = [config]
            monkeypatch.setitem(WAYS, "ours", Way(wrong_gradient) if config == 2 else right)

        return tune.Kernel("head", "ours", {}, lambda: used[0], put, lambda: [1, 2, 3])

    used[:] = [1]
    monkeypatch.setitem(tune.KERNELS, "faulty", kernel)
    tune.tune("faulty", "cpu", "float32", rounds=1, limit=None, left=lambda: 100.0)
    told = capsys.readouterr().out
    assert "wrong" in told
    assert used == [1]
    assert len([line for line in told.splitlines() if line.startswith("│ 2")]) == 1
