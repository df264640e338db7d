"""Runs from end to end: who is wrong or fails has a row that says so, and an interrupt loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gates, rows, runner, session
from benchmarks.registry import SIZES, SUITES, Workload, workloads
from benchmarks.rows import Row
from benchmarks.worker import what_failed

ROOT = Path(__file__).resolve().parent.parent.parent
FAULTY = ("ours", "eager", "trl-selective", "trl-chunked", "liger-dpo", "torch-linear-ce", "torch-linear-ce-chunked")


def head_rows() -> Workload:
    return next(workload for workload in workloads("head") if workload.name == "head-rows")


def context(kept: list[Row], **changes: Any) -> runner.Context:
    return runner.Context(device="cpu", rounds=3, keep=kept.extend, threads=1, timeout=120, **changes)


def seconds(kept: list[Row]) -> dict[str, Row]:
    return {row.provider: row for row in kept if row.metric == "seconds"}


def test_who_is_wrong_or_fails_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", "tests.benchmarks.faulty_worker")
    kept: list[Row] = []
    runner.measure(head_rows(), head_rows().cases("cpu", "tiny")[:1], context(kept, only=("products", *FAULTY)))
    of = seconds(kept)
    assert {name: row.status for name, row in of.items()} == {
        "products": "ok",
        "ours": "ok",
        "eager": "wrong",
        "trl-selective": "absent",
        "trl-chunked": "failed",
        "liger-dpo": "out of memory",
        "torch-linear-ce": "refused",
        "torch-linear-ce-chunked": "ok",
    }
    for name, row in of.items():
        assert len(row.values) == (3 if row.status == "ok" else 0), name
        assert bool(row.note) or row.status == "ok"
    metrics = {row.metric for row in kept if row.provider == "ours"}
    assert metrics >= {"seconds", "of_floor", "of_best_peer", "first_call_seconds", "extra_bytes", "error", "value"}
    assert {row.metric for row in kept if row.provider == "eager"} == {"seconds", "error", "error_dx", "error_dw"}
    best = next(row for row in kept if row.provider == "ours" and row.metric == "of_best_peer")
    assert best.note == "of torch-linear-ce-chunked"
    error = next(row for row in kept if row.provider == "eager" and row.metric == "error_dx")
    assert error.median > 0.1


def test_a_wrong_provider_is_caught_by_verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", "--suite", "head", "--size", "tiny", "--workloads", "head-rows", "--device", "cpu", "--no-tests"]
    command.main([*words, "--providers", "ours", "eager"])
    assert "wrong" not in capsys.readouterr().out
    monkeypatch.setattr(runner, "WORKER", "tests.benchmarks.wrong_worker")
    with pytest.raises(SystemExit) as stopped:
        command.main([*words, "--providers", "ours", "eager"])
    assert stopped.value.code == 1
    assert "wrong" in capsys.readouterr().out


def test_a_red_test_leaves_ours_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_it():\n    assert 1 + 1 == 3\n")
    workload = replace(head_rows(), tests=(str(red),))
    told = gates.of(workload, gates.red_tests([workload]))
    assert "1 failed" in told
    kept: list[Row] = []
    runner.measure(workload, workload.cases("cpu", "tiny")[:1], context(kept, only=("products", "ours")), told)
    of = seconds(kept)
    assert of["products"].status == "ok"
    assert of["ours"].status == "wrong"
    assert "1 failed" in of["ours"].note
    assert gates.of(workload, {}) == ""


def test_what_a_provider_raises_becomes_a_status() -> None:
    assert what_failed(ModuleNotFoundError("No module named 'peer'"))["status"] == "absent"
    assert what_failed(NotImplementedError("no CPU"))["status"] == "refused"
    assert what_failed(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "out of memory"
    assert what_failed(RuntimeError("shape\nsecond line")) == {"status": "failed", "note": "RuntimeError: shape"}
    assert what_failed(AssertionError())["status"] == "failed"
    assert what_failed(ValueError("cannot take these inputs: it fails its self-test on cuda"))["status"] == "failed"


def test_a_fault_of_ours_is_told_by_the_status_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", "tests.benchmarks.wrong_worker")
    words = ["run", "--suite", "head", "--workloads", "head-rows", "--size", "tiny", "--device", "cpu", "--no-tests"]
    with pytest.raises(SystemExit, match=r"^ours of head-rows: wrong$"):
        command.main([*words, "--providers", "ours", "--output", str(tmp_path)])
    assert "relative to float64" in (tmp_path / "README.md").read_text()


def test_a_case_that_is_too_large_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    of = {"device": "cpu", "dtype": "float32", "mode": "full", "rows": 8192, "vocab": 151936, "hidden": 896}
    monkeypatch.setattr(runner, "available_bytes", lambda: 8 * 2**30)
    assert runner.too_large(head_rows(), "eager", of)["status"] == "out of memory (estimated)"
    assert runner.too_large(head_rows(), "ours", of) == {}
    assert runner.too_large(head_rows(), "eager", {**of, "device": "cuda"}) == {}


def test_ratios_are_taken_round_by_round() -> None:
    workload = head_rows()
    case = workload.cases("cpu", "tiny")[0]
    times = {"products": [1.0, 2.0, 4.0], "ours": [1.1, 2.2, 4.4], "eager": [4.0, 2.0, 4.0], "trl-chunked": [9.0] * 3}
    answer = {"status": "ok", "first_call_seconds": 1.0, "extra_bytes": 5.0, "value": 0.5, "facts": {"result_bytes": 2}}
    told = context([], only=tuple(times))
    found = runner.as_rows(workload, case, told, {name: dict(answer) for name in times}, times)
    of = {row.metric: row for row in found if row.provider == "ours"}
    assert of["of_floor"].values == pytest.approx((1.1, 1.1, 1.1))  # a machine that grows slower
    assert of["of_best_peer"].values == pytest.approx((0.275, 1.1, 1.1))
    assert of["of_best_peer"].note == "of eager"
    assert of["beside_results_bytes"].values == (3.0,)
    assert of["seconds"].median == 2.2


def test_the_floor_is_the_slowest_bound_by_its_fastest_way() -> None:
    workload, of = head_rows(), {"products": [3.0, 3.0], "products-onednn": [2.0, 2.0], "bytes": [1.0, 1.0]}
    assert runner.floor_of(workload, of) == "products-onednn"
    assert runner.floor_of(workload, {**of, "bytes": [2.5, 2.5]}) == "bytes"
    assert runner.floor_of(workload, {"ours": [1.0]}) == ""
    base = runner.row_of(workload, workload.providers[0], workload.cases("cpu", "tiny")[0], context([]))
    (row,) = runner.ratio_rows(replace(base, provider="products"), workload, of)
    assert (row.metric, row.values, row.note) == ("of_floor", (1.5, 1.5), "of products-onednn")


def test_what_there_is_no_time_for_says_so() -> None:
    kept: list[Row] = []
    late = context(kept, only=("products", "ours"), deadline=time.monotonic())
    runner.measure(head_rows(), head_rows().cases("cpu", "tiny"), late)
    assert {row.status for row in kept if row.metric == "seconds"} == {"not run"}


def test_an_interrupt_leaves_rows_and_a_report(tmp_path: Path) -> None:
    words = ["run", "--suite", "head", "--workloads", "head-rows", "--size", "tiny", "--device", "cpu", "--no-tests"]
    more = ["--providers", "ours", "--rounds", "100000", "--threads", "1", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    for _ in range(600):  # until rounds are under way: workers of the measured case exist
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("needs /proc")
        if len(children.read_text().split()) >= 2:
            break
        time.sleep(0.1)
    time.sleep(15)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    kept = rows.read(tmp_path)
    assert next(row for row in kept if row.provider == "ours" and row.metric == "seconds").values
    assert (tmp_path / "README.md").exists()
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"] != "absent"


def test_a_workload_that_breaks_off_leaves_the_others_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(case: dict[str, Any], folder: Path) -> None:
        if case["of"] == "records":
            raise OSError("no space left on device")

    monkeypatch.setattr("benchmarks.suites.data.task.prepare", full)
    words = ["run", "--suite", "data", "--size", "tiny", "--no-tests", "--output", str(tmp_path), "--threads", "1"]
    with pytest.raises(SystemExit, match="data-load could not be measured to its end"):
        command.main([*words, "--providers", "ours"])
    found = {(row.workload, row.provider): row for row in rows.read(tmp_path) if row.metric == "seconds"}
    assert found["data-load", "ours"].status == "failed"
    assert found["data-load", "ours"].note == "OSError: no space left on device"
    assert found["data-pack", "ours"].values


def test_a_case_that_breaks_off_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have figures keep them."""

    def broken(*given: Any) -> None:
        *_, answers, seconds = given
        answers["products"] |= {"first_call_seconds": 2.0, "extra_bytes": 1, "value": 0.0, "facts": {}}
        seconds["products"] = [1.0]
        raise OSError("no space left on device")

    monkeypatch.setattr(runner, "take_turns", broken)
    kept: list[Row] = []
    workload = head_rows()
    with pytest.raises(OSError, match="no space"):
        runner.measure(workload, workload.cases("cpu", "tiny"), context(kept, only=("products", "ours")))
    of = seconds(kept)
    assert (of["products"].values, of["products"].note) == ((1.0,), "")
    assert (of["ours"].status, of["ours"].note) == ("failed", "OSError: no space left on device")


def test_what_stops_a_run_stops_its_tests(tmp_path: Path) -> None:
    slow, started = tmp_path / "test_slow.py", tmp_path / "started"
    slow.write_text(
        f"import pathlib, time\n\n\ndef test_it():\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(100)\n"
    )
    workload = replace(head_rows(), tests=(str(slow),))

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, command._interrupt)
    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            gates.red_tests([workload])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 60


def test_a_fault_beside_others_does_not_stop_the_run() -> None:
    def work(number: int) -> int:
        if number == 1:
            raise ValueError("one")
        return number

    told = context([])
    with pytest.raises(ValueError, match="one"):
        told.side_by_side(work, range(4))
    with told.open("json.tool", {}) as worker:
        assert not worker.ended
    with pytest.raises(KeyboardInterrupt):
        told.side_by_side(lambda _: (_ for _ in ()).throw(KeyboardInterrupt), [0])
    with pytest.raises(RuntimeError, match="the run was stopped"), told.open("json.tool", {}):
        pass


def test_rows_of_other_workloads_stay(tmp_path: Path) -> None:
    words = ["run", "--suite", "data", "--size", "tiny", "--no-tests", "--output", str(tmp_path), "--threads", "1"]
    command.main([*words, "--workloads", "data-pack", "--providers", "ours"])
    command.main([*words, "--workloads", "data-load", "--providers", "ours"])
    found = {row.workload for row in rows.read(tmp_path)}
    assert found == {"data-pack", "data-load"}
    assert os.listdir(tmp_path / "plots")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "nobody"], "invalid choice: 'nobody'"),
        (["--workloads", "head-nothing"], "no workload head-nothing in suite all; there are head-rows"),
        (["--providers", "nobody"], "no provider nobody; there are products"),
        (["--model", "here"], "--model and --data go together"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["run", "--device", "cpu", *words])
    assert said in capsys.readouterr().err + str(stopped.value)


def test_the_registry_is_whole() -> None:
    every = workloads()
    assert {workload.suite for workload in every} == set(SUITES)
    assert len({workload.name for workload in every}) == len(every)
    for workload in every:
        names = [p.name for p in workload.providers]
        assert len(set(names)) == len(names)
        assert {p.role for p in workload.providers} == {"floor", "peer", "ours"}
        assert "ours" in names
        assert workload.tests
        assert all((ROOT / test).exists() for test in workload.tests)
        assert set(workload.dry) <= set(names)
        for device in ("cpu", "cuda"):
            for size in SIZES:
                for case in workload.cases(device, size):
                    assert {"mode", "device", workload.x, *workload.kinds} <= set(case)
                    json.dumps(case)
    assert set(session.ROUNDS) == set(SIZES)


def documented() -> list[str]:
    """Commands of this package in the documents."""
    found = set()
    for name in ("benchmarks/README.md", "README.md", "CONTRIBUTING.md"):
        found |= set(re.findall(r"^    (python -m benchmarks [^#\n]*)", (ROOT / name).read_text(), re.MULTILINE))
    return sorted(found)


@pytest.mark.parametrize("line", documented())
def test_documented_commands_are_understood(line: str) -> None:
    words = line.split()
    assert words[:3] == ["python", "-m", "benchmarks"]
    options = command.parser().parse_args(words[3:])
    assert callable(options.command)
    session.chosen(getattr(options, "suite", "all"), getattr(options, "workloads", None))


def test_commands_are_documented() -> None:
    assert len(documented()) >= 4
