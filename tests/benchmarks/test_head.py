"""The head suite on tiny problems: who is right is measured, who is not is caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suites.head import PROVIDERS, WORKLOADS
from benchmarks.suites.head import task as head
from benchmarks.suites.head.providers import WAYS, Problem, Way, branch_length, matrix_products, onednn, plain
from tests.benchmarks.faulty_worker import wrong_gradient

COMPILED = ("eager-compiled", "liger-dpo", "cut-cross-entropy")
MODES = ("full", "frozen", "logp")
ON_CPU = [p.name for p in PROVIDERS if "cpu" in p.devices and p.role != "floor"]


def case(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "device": "cpu", "hidden": 32, "mode": "full", "inputs": "random", **changes}


def errors_of(name: str, **changes: Any) -> dict[str, float]:
    try:
        return head.errors(name, case(**changes))
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    except ValueError as error:
        if name != "ours-memory" or "implementation 'cpu' cannot take" not in str(error):  # no C++ operators
            raise
        pytest.skip(str(error))


def is_wrong(errors: dict[str, float], dtype: str) -> bool:
    return not all(error <= head.TOLERANCE[dtype] for error in errors.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name not in COMPILED])
def test_every_provider_is_right(name: str, dtype: str, mode: str) -> None:
    errors = errors_of(name, dtype=dtype, mode=mode)
    assert list(errors) == ["error", "error_dx", "error_dw"][: {"full": 3, "frozen": 2, "logp": 1}[mode]]
    assert not is_wrong(errors, dtype), errors


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPILED)
def test_every_compiled_provider_is_right(name: str, mode: str) -> None:
    errors = errors_of(name, mode=mode)
    assert not is_wrong(errors, "float32"), errors


@pytest.mark.parametrize("dtype", list(head.TOLERANCE))
def test_a_wrong_gradient_is_caught(dtype: str) -> None:
    errors = head.verify(Way(wrong_gradient), head.small_problem(case(dtype=dtype)))
    assert errors["error"] < head.TOLERANCE[dtype]
    assert is_wrong(errors, dtype)


def test_a_gradient_that_ignores_upstream_is_caught() -> None:
    def run(problem: Problem) -> torch.Tensor:
        return WAYS["eager"].run(problem).mean().expand(problem.target.shape)

    assert is_wrong(head.verify(Way(run), head.small_problem(case())), "float32")


def test_a_result_that_is_not_a_number_is_caught() -> None:
    def run(problem: Problem) -> torch.Tensor:
        return WAYS["eager"].run(problem) * float("nan")

    assert is_wrong(head.verify(Way(run), head.small_problem(case())), "bfloat16")


def test_a_result_of_another_shape_and_a_missing_gradient_are_caught() -> None:
    problem = head.small_problem(case())
    total = Way(lambda problem: WAYS["eager"].run(problem).sum())
    assert head.verify(total, problem)["error"] == math.inf
    assert head.relative(None, problem.weight) == math.inf


def problem_at_size(folder: Path, name: str, **changes: Any) -> dict[str, float]:
    """Errors of a provider on the problem that is measured."""
    of = case(rows=256, hidden=64, vocab=9000, inputs="random") | changes
    head.prepare(of, folder)
    task = head.load(name, of, folder)
    return task.errors(task.run())


@pytest.mark.parametrize("inputs", ["random", "peaked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ours", "eager", "trl-chunked", "torch-linear-ce"])
def test_a_sample_of_what_is_measured_is_right(tmp_path: Path, name: str, dtype: str, inputs: str) -> None:
    if name == "trl-chunked":
        pytest.importorskip("trl")
    of = {"dtype": dtype, "inputs": inputs, "vocab": 49_152 if inputs == "peaked" else 9000}
    errors = problem_at_size(tmp_path, name, **of)
    assert list(errors) == ["error_sample", "error_dx_sample", "error_dw_sum"]
    assert all(error <= head.tolerance(case(**of)) for error in errors.values()), errors


@pytest.mark.parametrize(("dtype", "inputs"), [("float32", "random"), ("bfloat16", "peaked")])
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda logp: torch.cat([logp[:128], logp[128:] * 1.1]), ["error_sample", "error_dx_sample"]),
        (lambda logp: torch.cat([logp[:128], logp[128:].detach()]), ["error_dx_sample"]),
    ],
)
def test_a_fault_in_a_later_chunk_is_caught(
    tmp_path: Path,
    fault: Callable[[torch.Tensor], torch.Tensor],
    found: list[str],
    dtype: str,
    inputs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(WAYS, "wrong", Way(lambda problem: fault(WAYS["eager"].run(problem))))
    of = {"dtype": dtype, "inputs": inputs}
    errors = problem_at_size(tmp_path, "wrong", **of)
    assert [name for name, error in errors.items() if error > head.tolerance(case(**of))] == found


def test_peaked_inputs_are_verified_as_such() -> None:
    problem = head.small_problem(case(inputs="peaked"))
    logits = problem.hidden.detach() @ problem.weight.detach().T
    assert logits.softmax(dim=1).gather(1, problem.target[:, None]).median() > 0.5
    for workload in WORKLOADS:
        assert "inputs" in workload.kinds  # or one of them would be verified for the other


def test_a_dw_that_lost_a_chunk_is_caught() -> None:
    problem = head.small_problem(case())
    _, (dx, dw) = head.call(WAYS["eager"], problem)
    assert head.disagreement(dx, dw, problem) < 1e-6
    _, (_, of_half) = head.call(Way(lambda p: WAYS["eager"].run(p) * (torch.arange(96) < 48)), problem)
    assert head.disagreement(dx, of_half, problem) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("linear", [plain, onednn])
def test_the_floor_computes_all_products(linear: Callable[..., torch.Tensor], dtype: str) -> None:
    if linear is onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    problem = head.small_problem(case(dtype=dtype))
    x, w = problem.hidden.detach().double(), problem.weight.detach().double()
    p, dx, dw = (y.double() for y in matrix_products(problem, linear))
    for got, right in ((p, x @ w.T), (dx, p @ w), (dw, p.T @ x)):
        assert (got - right).norm() < head.TOLERANCE[dtype] * right.norm()


def test_oracles_agree_on_what_they_share() -> None:
    problem = head.small_problem(case())
    logp, _ = head.oracle("rows", problem)
    total, (dx, _) = head.oracle("sum", problem)
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
    of = case(dtype=dtype, rows=64, hidden=256, vocab=9000, inputs=kind)
    head.prepare(of, tmp_path)
    problem = head.read_problem(of, tmp_path)
    assert problem.weight.shape == (9000, 256)
    assert problem.hidden.dtype == getattr(torch, dtype)
    logits = problem.hidden.detach().float() @ problem.weight.detach().float().T
    likely = logits.softmax(dim=1).gather(1, problem.target[:, None]).median()
    assert likely > 0.8 if kind == "peaked" else likely < 0.01
    assert len(problem.weight.detach().float().unique(dim=0)) == 9000  # no row twice
    assert problem.upstream.unique().numel() == 64


def test_what_a_case_needs_grows_with_its_logits() -> None:
    of = case(rows=8192, vocab=151936, hidden=896)
    logits = 8192 * 151936 * 4
    assert head.needs("eager", of) > 3 * logits
    assert head.needs("ours", of) < 0.4 * logits
    assert head.gradient_bytes(of) == (8192 + 151936) * 896 * 4


def test_every_provider_has_its_way_and_every_case_its_inputs() -> None:
    assert {p.name for p in PROVIDERS} == set(WAYS)
    for workload in WORKLOADS:
        for device, size in (("cpu", "quick"), ("cpu", "full"), ("cuda", "quick"), ("cuda", "full")):
            for of in workload.cases(device, size):
                assert {"rows", "hidden", "vocab", "inputs", "dtype", "mode", "device", workload.x} <= set(of)
                assert of["rows"] % 2 == 0
