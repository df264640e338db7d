"""`python -m benchmarks gpu`, without a GPU: all of it runs, in its dry form."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, report, rows, tune
from benchmarks.registry import Case, workloads
from benchmarks.runner import Context
from benchmarks.suites.step import tiny, trainers
from tests.benchmarks.test_results import row

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


HEAD = "import pytest, time\n\npytestmark = pytest.mark.gpu\n\n"
RED = "def test_red():\n    raise ValueError('it is red')\n\n"
SLOW = "def test_slow():\n    time.sleep(60)\n\n"
GREEN = "@pytest.mark.parametrize('name', ['a', 'two words'])\ndef test_green(name):\n    pass\n\n"


def test_what_pytest_says_to_its_end(tmp_path: Path) -> None:
    """Files that cannot be collected leave the others their turn."""
    whole, broken = tmp_path / "test_whole.py", tmp_path / "test_broken.py"
    whole.write_text(HEAD + GREEN + RED)
    broken.write_text(HEAD + "import no_such_module\n")
    told = gpu.run_tests(tmp_path, 60.0, [str(whole), str(broken)])
    assert told["status"] == 1
    assert [name.rpartition("/")[2] for name in told["failed"]] == ["test_whole.py::test_red", "test_broken.py"]
    assert "1 failed, 2 passed" in told["summary"]
    assert json.loads((tmp_path / "gpu-tests.json").read_text()) == told
    whole.write_text(HEAD + GREEN)
    told = gpu.run_tests(tmp_path, 60.0, [str(whole)])
    assert (told["status"], told["failed"]) == (0, [])


@pytest.mark.parametrize("processes", [1, 2])
def test_what_time_leaves_of_the_tests_is_told(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name what had failed, and why, even though a test had to be stopped."""
    if processes > 1:
        pytest.importorskip("xdist")
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * processes)
    slow = tmp_path / "test_it.py"
    slow.write_text(HEAD + GREEN + RED + SLOW)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a shell started it with &
    try:
        told = gpu.run_tests(tmp_path, 12.0, [str(slow)])
    finally:
        signal.signal(signal.SIGINT, before)
    log = (tmp_path / "gpu-tests.log").read_text()
    assert ("[gw1]" in log) == (processes > 1)
    assert told["status"] == 1
    assert told["summary"].startswith("stopped after 12 s at 75%: ")
    assert "2 passed" in told["summary"]
    assert "1 failed" in told["summary"]
    assert [name.rpartition("/")[2] for name in told["failed"]] == ["test_it.py::test_red"]
    assert "it is red" in log  # its traceback: pytest was asked to end before it was made to


def test_a_test_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    deaf = tmp_path / "test_it.py"
    signals = "import signal\n\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n\n"
    deaf.write_text(HEAD + signals + RED + SLOW)
    told = gpu.run_tests(tmp_path, 8.0, [str(deaf)])
    assert told["seconds"] < 15
    assert len(told["failed"]) == 1


def test_interrupted_tests_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a test has failed, and again while pytest is given time to end."""
    waits: list[float] = []

    class Interrupted(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            waits.append(timeout)
            while len(waits) == 1 and " FAILED " not in (tmp_path / "gpu-tests.log").read_text():
                time.sleep(0.1)
            raise KeyboardInterrupt

    slow = tmp_path / "test_it.py"
    slow.write_text(HEAD + RED + SLOW)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_tests(tmp_path, 60.0, [str(slow)])
    assert waits == [60.0, gpu.GRACE]
    told = json.loads((tmp_path / "gpu-tests.json").read_text())
    assert told["status"] == 1
    assert told["summary"].startswith("stopped after ")
    assert len(told["failed"]) == 1


def test_red_tests_are_what_the_report_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_red.py").write_text(f"import pytest\n\n\n@pytest.mark.gpu\n{RED}")
    monkeypatch.setattr(gpu, "MARKED", (str(tmp_path / "test_red.py"),))
    monkeypatch.setattr(gpu, "SHARES", {})
    options = argparse.Namespace(time_limit=100.0, output=tmp_path, dry=True)
    assert "1 failed" in gpu.run(options)[0]
    rows.write(tmp_path / "head.csv", [row("ours"), row("ours", "of_floor", (1.1,))])
    told, in_short, _ = report.write_report(tmp_path).read_text().partition("## In short")
    assert in_short
    assert "## Tests marked gpu\n\n1 failed" in told
    assert "test_red.py::test_red`" in told


def test_nothing_marked_gpu_is_forgotten() -> None:
    marked = [
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/**/test_*.py")
        if re.search(r"^(@|pytestmark = )pytest\.mark\.gpu", path.read_text(), re.MULTILINE)
    ]
    assert sorted(marked) == sorted(gpu.MARKED)


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
    of: Case = tiny("cpu", pairs_per_step=4, pairs=256, rounds=1, alone=True) | {"mode": mode}
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
