"""The head suite on tiny problems: who is right is measured, who is not is caught."""

from __future__ import annotations

import csv
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import head
from benchmarks.__main__ import main
from benchmarks.head_providers import MODES, PROVIDERS, Problem, Provider, branch_length, matrix_products, onednn, plain
from benchmarks.head_worker import (
    TOLERANCE,
    is_wrong,
    oracle,
    read_problem,
    small_problem,
    verify,
    what_failed,
    write_inputs,
)
from tests.benchmarks.faulty_worker import wrong_gradient

COMPILED = ("eager-compiled", "liger-dpo", "cut-cross-entropy")
ON_CPU = [
    name for name, provider in PROVIDERS.items() if "cpu" in provider.devices and provider.objective != "products"
]


def settings(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "device": "cpu", "hidden": 32, "mode": "full", "threads": 1, **changes}


def errors_of(name: str, **changes: Any) -> dict[str, float]:
    try:
        return verify(PROVIDERS[name], small_problem(settings(**changes)))
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    except ValueError as error:  # the C++ operators
        pytest.skip(str(error))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name not in COMPILED])
def test_every_provider_is_right(name: str, dtype: str, mode: str) -> None:
    errors = errors_of(name, dtype=dtype, mode=mode)
    assert list(errors) == ["error", "error_dx", "error_dw"][: {"full": 3, "frozen": 2, "logp": 1}[mode]]
    assert not is_wrong(errors, getattr(torch, dtype)), errors


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPILED)
def test_every_compiled_provider_is_right(name: str, mode: str) -> None:
    errors = errors_of(name, mode=mode)
    assert not is_wrong(errors, torch.float32), errors


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_wrong_gradient_is_caught(dtype: torch.dtype) -> None:
    errors = verify(Provider(wrong_gradient), small_problem(settings(dtype=str(dtype).removeprefix("torch."))))
    assert errors["error"] < TOLERANCE[dtype]
    assert is_wrong(errors, dtype)


def test_a_gradient_that_ignores_upstream_is_caught() -> None:
    def run(problem: Problem) -> torch.Tensor:
        return PROVIDERS["eager"].run(problem).mean().expand(problem.target.shape)

    assert is_wrong(verify(Provider(run), small_problem(settings())), torch.float32)


def test_a_result_that_is_not_a_number_is_caught() -> None:
    def run(problem: Problem) -> torch.Tensor:
        return PROVIDERS["eager"].run(problem) * float("nan")

    assert is_wrong(verify(Provider(run), small_problem(settings())), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("linear", [plain, onednn])
def test_the_floor_computes_all_products(linear: Callable[..., torch.Tensor], dtype: str) -> None:
    if linear is onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    problem = small_problem(settings(dtype=dtype))
    x, w = problem.hidden.detach().double(), problem.weight.detach().double()
    p, dx, dw = (y.double() for y in matrix_products(problem, linear))
    for got, right in ((p, x @ w.T), (dx, p @ w), (dw, p.T @ x)):
        assert (got - right).norm() < TOLERANCE[getattr(torch, dtype)] * right.norm()


def test_oracles_agree_on_what_they_share() -> None:
    problem = small_problem(settings())
    logp, _ = oracle("rows", problem)
    total, (dx, _) = oracle("sum", problem)
    torch.testing.assert_close(total, -logp.sum())
    probabilities = (problem.hidden.double() @ problem.weight.double().T).softmax(dim=1)
    expected = probabilities @ problem.weight.double() - problem.weight.double()[problem.target]
    torch.testing.assert_close(dx, expected.detach())


@pytest.mark.parametrize("rows", [2, 6, 96, 128, 1024, 8192])
def test_rows_make_whole_pairs(rows: int) -> None:
    length = branch_length(rows)
    assert rows % (2 * length) == 0
    assert 1 <= length <= 64


@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workers_read_what_was_written(tmp_path: Path, dtype: str, kind: str) -> None:
    write_inputs(tmp_path, dtype, 64, 256, 9000, kind)
    problem = read_problem(settings(dtype=dtype, rows=64, hidden=256, vocab=9000, inputs=str(tmp_path)))
    assert problem.weight.shape == (9000, 256)
    assert problem.hidden.dtype == getattr(torch, dtype)
    logits = problem.hidden.detach().float() @ problem.weight.detach().float().T
    likely = logits.softmax(dim=1).gather(1, problem.target[:, None]).median()
    assert likely > 0.8 if kind == "peaked" else likely < 0.01
    assert len(problem.weight.detach().float().unique(dim=0)) == 9000  # no row twice
    assert problem.upstream.unique().numel() == 64


def test_what_a_provider_raises_becomes_a_status() -> None:
    assert what_failed(ModuleNotFoundError("No module named 'peer'"))["status"] == "absent"
    assert what_failed(NotImplementedError("no CPU"))["status"] == "refused"
    assert what_failed(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "out of memory"
    assert what_failed(RuntimeError("shape\nsecond line")) == {"status": "failed", "note": "RuntimeError: shape"}


def test_a_problem_that_is_too_large_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = settings(rows=8192, vocab=151936, hidden=896)
    monkeypatch.setattr(head, "available_bytes", lambda: 8 * 2**30)
    assert head.too_large("eager", problem)["status"] == "out of memory (estimated)"
    assert head.too_large("ours", problem) == {}
    assert head.too_large("eager", {**problem, "device": "cuda"}) == {}


def test_ratios_are_taken_round_by_round() -> None:
    problem = settings(rows=64, vocab=1000)
    seconds = {"products": [1.0, 2.0, 4.0], "ours": [1.1, 2.2, 4.4]}  # a machine that grows slower
    row = head.as_row("ours", problem, {"status": "ok"}, seconds)
    assert row["seconds"] == 2.2
    assert row["of_products_20"] == pytest.approx(1.1)
    assert row["of_products_80"] == pytest.approx(1.1)
    assert row["gradient_bytes"] == (64 + 1000) * 32 * 4


def test_the_suite_runs_and_reports_who_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head, "WORKER", "tests.benchmarks.faulty_worker")
    parser = ArgumentParser()
    parser.add_argument("--output", type=Path, default=tmp_path)
    parser.add_argument("--threads", type=int, default=1)
    head.add_arguments(parser)
    providers = ("products", "ours", "eager", "trl-selective", "trl-chunked", "liger-dpo", "quack")
    sizes = ("--rows", "64", "--vocab", "1500", "--hidden", "32", "--device", "cpu")
    head.run(
        parser.parse_args(
            [*sizes, "--dtypes", "float32", "--repeats", "2", "--timeout", "120", "--providers", *providers]
        )
    )
    with (tmp_path / "rows.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert (tmp_path / "environment.json").exists()
    assert {name: row["status"] for name, row in rows.items()} == {
        "products": "ok",
        "ours": "ok",
        "eager": "wrong",
        "trl-selective": "absent",
        "trl-chunked": "failed",
        "liger-dpo": "out of memory",
        "quack": "refused",
    }
    for name, row in rows.items():
        figures = ("seconds", "of_products", "first_call_seconds", "extra_bytes", "rounds")
        assert [bool(row[figure]) for figure in figures] == [name in ("products", "ours")] * len(figures)
    assert float(rows["eager"]["error_dx"]) > 0.1
    assert rows["ours"]["rounds"] == "2"
    printed = capsys.readouterr().out
    assert "absent" in printed
    assert "the time of the products" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--help",), "--pairs-per-step"),
        (("--suite", "head", "--help"), "--vocab"),
        (("--suite", "head", "--rows", "7"), "7 is not an even number"),
        (("--suite", "head", "--providers", "ours", "nobody"), "invalid choice: 'nobody'"),
    ],
)
def test_each_suite_has_its_own_options(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", *words])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
