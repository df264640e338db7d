"""The pair loss in Triton against the definition: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels import _dispatch, use_impl
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.ops.pair_loss import PairLoss, pair_loss
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import Ragged
from tests.forests import nested_pairs
from tests.numerics import assert_as_good_as_eager

pytest.importorskip("triton")
from stepdpo_kernels.ops.pair_loss import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = triton_kernel.BLOCK


def _ragged(rows: list[list[int]], columns: int) -> Ragged:
    index = np.array([c for row in rows for c in row], np.int64)
    return Ragged.from_rows(index, np.array([len(row) for row in rows], np.int64), columns)


def _problem(
    rows: list[list[int]], tokens: int, chosen: list[int], rejected: list[int], seed: int = 0
) -> tuple[Tensor, Ragged, Tensor, Tensor, Tensor, Tensor]:
    """token_logps, branches, chosen, rejected, ref_logps near the branch sums, weights"""
    generator = torch.Generator().manual_seed(seed)
    token_logps = -3 * torch.rand(tokens, generator=generator)
    pairs = (torch.tensor(chosen, dtype=torch.int64), torch.tensor(rejected, dtype=torch.int64))
    branches = _ragged(rows, tokens)
    sums = torch.tensor([token_logps[row].sum() for row in rows])
    refs = torch.cat([sums[side] for side in pairs]) + torch.randn(2 * len(chosen), generator=generator)
    weights = torch.rand(len(chosen), generator=generator) * 2
    return (
        token_logps.to(DEVICE),
        branches.to(DEVICE),
        *(side.to(DEVICE) for side in pairs),
        refs.to(DEVICE),
        weights.to(DEVICE),
    )  # type: ignore[return-value]


def _run(impl: str, dtype: torch.dtype, problem: Any, **options: Any) -> list[Tensor]:
    """Every output, then the gradient of the token log-probs for upstream gradients of both kinds."""
    token_logps, branches, chosen, rejected, refs, weights = problem
    leaf = token_logps.to(dtype).requires_grad_()
    out = pair_loss(leaf, branches, chosen, rejected, refs, weights, impl=impl, **options)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out.losses, out.logps)]
    gradients = [
        torch.autograd.grad(outputs, leaf, grads, retain_graph=True)[0]
        for outputs, grads in (
            ([out.losses], upstream[:1]),
            ([out.logps], upstream[1:]),
            ([out.losses, out.logps], upstream),
        )
    ]
    return [*(t.detach() for t in out), *gradients]


_NAMES = (*PairLoss._fields, "gradient of losses", "gradient of logps", "gradient of both")


def _compare(problem: Any, **options: Any) -> None:
    ours, eager = (_run(impl, torch.float32, problem, **options) for impl in ("triton", "reference"))
    oracle = _run("reference", torch.float64, problem, **options)
    for name, a, b, o in zip(_NAMES, ours, eager, oracle, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == o.shape
        if o.numel():
            assert_as_good_as_eager(name, a, b, o, torch.float32)


FORMS: dict[str, tuple[list[list[int]], int, list[int], list[int]]] = {
    "one pair": ([[0, 1, 2], [3, 4]], 5, [0], [1]),
    "shared branches": ([[0, 1], [2, 3, 4], [5], [6, 7]], 8, [0, 0, 3, 1], [1, 2, 1, 0]),
    "shared tokens": ([[0, 1, 2], [0, 1, 3], [0, 4], [0, 1, 2, 5]], 6, [0, 2, 3], [1, 1, 0]),
    "empty branches": ([[0, 1], [], [2]], 3, [0, 1, 1, 1], [1, 2, 1, 0]),
    "a pair against itself": ([[0, 1], [2]], 3, [0, 1], [0, 1]),
    "unused branches and tokens": ([[1], [3, 4], [5], [6]], 8, [1], [3]),
    "no tokens": ([[], []], 0, [0, 1], [1, 0]),
    "no pairs": ([[0, 1], [2]], 3, [], []),
    "nothing": ([], 0, [], []),
    "long branches": (
        [list(range(BLOCK)), list(range(BLOCK, 3 * BLOCK + 7)), list(range(BLOCK - 1))],
        3 * BLOCK + 7,
        [0, 2],
        [1, 1],
    ),
    "more pairs than a block": ([[0, 1], [2], [3, 4]], 5, [p % 2 for p in range(BLOCK + 9)], [2] * (BLOCK + 9)),
}


@pytest.mark.parametrize("options", [{"beta": 0.4}, {"beta": 2.5, "label_smoothing": 0.1}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, options: dict[str, float]) -> None:
    _compare(_problem(*FORMS[form]), **options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([0.0, 0.25]))
def test_any_shape(data: st.DataObject, label_smoothing: float) -> None:
    tokens = data.draw(st.integers(0, 12))
    row = st.lists(st.integers(0, tokens - 1), max_size=5, unique=True) if tokens else st.just([])
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    branch = st.integers(0, len(rows) - 1)
    pairs = data.draw(st.lists(st.tuples(branch, branch), max_size=5))
    problem = _problem(rows, tokens, [c for c, _ in pairs], [r for _, r in pairs])
    _compare(problem, beta=0.7, label_smoothing=label_smoothing)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_reference_and_weights_may_be_left_out(with_reference: bool, weighted: bool) -> None:
    *problem, refs, weights = _problem(*FORMS["shared branches"])
    _compare((*problem, refs if with_reference else None, weights if weighted else None))
    ones, zeros = torch.ones_like(weights), torch.zeros_like(refs)
    left_out = _run("triton", torch.float32, (*problem, None, None))
    for a, b in zip(left_out, _run("triton", torch.float32, (*problem, zeros, ones)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("margin", [0.0, 20.0, 60.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_margins_far_from_zero(margin: float, sign: int, label_smoothing: float) -> None:
    token_logps, branches, chosen, rejected, refs, _ = _problem(*FORMS["one pair"])
    refs = torch.stack([token_logps[:3].sum() - sign * margin, token_logps[3:].sum()])
    leaf = token_logps.requires_grad_()
    out = pair_loss(leaf, branches, chosen, rejected, refs, label_smoothing=label_smoothing, impl="triton")
    (gradient,) = torch.autograd.grad(out.losses.sum(), leaf)
    x = out.margins.item()
    small = math.log1p(math.exp(-abs(x)))
    e = label_smoothing
    assert out.losses.item() == pytest.approx((1 - e) * (max(-x, 0) + small) + e * (max(x, 0) + small), rel=1e-6, abs=0)
    tiny = math.exp(-abs(x)) / (1 + math.exp(-abs(x)))
    up, down = (1 - tiny, tiny) if x >= 0 else (tiny, 1 - tiny)
    slope = e * up - (1 - e) * down
    assert gradient[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-38)
    assert gradient[3].item() == pytest.approx(-slope, rel=1e-5, abs=1e-38)


def test_a_branch_has_the_same_bits_in_every_pair_and_on_either_side() -> None:
    tokens = 2 * BLOCK + 5
    problem = _problem([list(range(tokens)), list(range(3, 40))], tokens, [0, 0, 1, 1], [1, 0, 0, 1])
    token_logps, branches, chosen, rejected, *_ = problem
    logps = pair_loss(token_logps, branches, chosen, rejected, impl="triton").logps
    assert logps.tolist() == [logps[0].item(), logps[0].item(), logps[2].item(), logps[2].item(), *logps[[2, 0, 0, 2]]]
    again = pair_loss(token_logps, branches, chosen, rejected, logps, impl="triton")
    assert again.margins.tolist() == again.chosen_rewards.tolist() == [0.0] * 4
    assert again.losses.tolist() == [torch.tensor(2.0).log().item()] * 4


def test_sums_are_exact_to_the_last_bit() -> None:
    tokens = 3000
    token_logps, *rest = _problem([list(range(tokens)), [0]], tokens, [0], [1])
    token_logps[0] = -(2.0**24)  # in float32 what is added to it is lost
    logps = pair_loss(token_logps, *rest[:3], impl="triton").logps
    assert logps[0].item() == token_logps.double().sum().float().item()


def test_the_same_bits_every_time() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.choice(60, rng.integers(0, 30), replace=False).tolist() for _ in range(9)]
    problem = _problem(rows, 60, rng.integers(0, 9, 12).tolist(), rng.integers(0, 9, 12).tolist())
    first, second = (_run("triton", torch.float32, problem, beta=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_losses_and_logps_carry_a_gradient(impl: str) -> None:
    token_logps, *rest, refs, weights = _problem(*FORMS["shared branches"])
    refs.requires_grad_()
    weights.requires_grad_()
    out = pair_loss(token_logps.requires_grad_(), *rest, refs, weights, impl=impl)
    assert [t.requires_grad for t in out] == [True, True, False, False, False]
    (out.losses.sum() + out.logps.sum()).backward()
    assert refs.grad is None
    assert weights.grad is None
    with torch.no_grad():
        assert not pair_loss(token_logps, *rest, impl=impl).losses.requires_grad


def test_inputs_need_not_be_contiguous() -> None:
    token_logps, branches, chosen, rejected, refs, weights = _problem(*FORMS["shared tokens"])
    plain = _run("triton", torch.float32, (token_logps, branches, chosen, rejected, refs, weights), beta=0.4)
    strided = [t.repeat_interleave(2)[::2] for t in (token_logps, chosen, rejected, refs, weights)]
    assert not strided[0].is_contiguous()
    again = _run("triton", torch.float32, (strided[0], branches, *strided[1:]), beta=0.4)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_there_is_no_second_derivative() -> None:
    token_logps, *rest = _problem(*FORMS["one pair"])
    leaf = token_logps.requires_grad_()
    with pytest.raises(RuntimeError, match="pair_loss in Triton has no second derivative; use impl='reference'"):
        torch.autograd.grad(pair_loss(leaf, *rest, impl="triton").losses.sum(), leaf, create_graph=True)


def test_torch_accepts_the_operators() -> None:
    token_logps, branches, chosen, rejected, refs, weights = _problem(*FORMS["shared branches"])
    b = branches
    for extra in ((refs, weights), (None, None)):
        leaf = token_logps.clone().requires_grad_()
        arguments = (leaf, b.index, b.lengths, b.t_index, b.t_lengths, chosen, rejected, *extra, 0.4, 0.1)
        torch.library.opcheck(triton_kernel._pair_loss, arguments)
    torch.library.opcheck(triton_kernel._token_gradients, (refs, chosen, rejected, b.t_index, b.t_lengths, 4))


# ---- in the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "rpo_alpha": 0.5},
        {"loss_type": "ipo"},
        {"loss_type": "simpo"},
    ],
    ids=str,
)
def test_the_loss_is_the_same_with_it(options: dict[str, Any]) -> None:
    pairs = nested_pairs(60)
    batch = build_batch(pairs, range(len(pairs)), "tree").to(DEVICE)
    loss_fn = StepDPOLoss(impl="reference", **options)
    hidden = torch.randn(batch.num_tokens, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(60, 8, device=DEVICE, requires_grad=True)
    refs = None if loss_fn.reference_free else -20 + torch.randn(2 * len(pairs), device=DEVICE)
    results = {}
    for impl in ("triton", "torch"):
        with use_impl(pair_loss=impl):
            out = loss_fn.packed(hidden, weight, batch, refs)
            results[impl] = [out.loss, out.margins, out.chosen_logps, *torch.autograd.grad(out.loss, [hidden, weight])]
            if not loss_fn.reference_free:  # I2
                again = loss_fn.packed(hidden, weight, batch, loss_fn.packed_logps(hidden, weight, batch))
                assert again.margins.tolist() == [0.0] * len(pairs)
    torch.testing.assert_close(results["triton"], results["torch"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_compiled_caller_needs_no_graph_break(impl: str) -> None:
    pairs = nested_pairs(60)
    batch = build_batch(pairs, range(len(pairs)), "tree").to(DEVICE)
    hidden = torch.randn(batch.num_tokens, 8, device=DEVICE, requires_grad=True)
    weight, refs = torch.randn(60, 8, device=DEVICE), -20 + torch.randn(2 * len(pairs), device=DEVICE)

    def loss(hidden: Tensor) -> Tensor:
        return StepDPOLoss(impl="chunked").packed(hidden, weight, batch, refs).loss

    with use_impl(pair_loss=impl):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for function in (loss, compiled):
            value = function(hidden)
            found = [value, *torch.autograd.grad(value, hidden)]
            if function is loss:
                expected = found
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


# ---- choosing -------------------------------------------------------------------------------------------------------


def test_a_cpu_takes_torch_and_says_so_quietly(caplog: pytest.LogCaptureFixture) -> None:
    _dispatch._log_choice.cache_clear()
    arguments = [t.to("cpu") for t in _problem(*FORMS["one pair"])]
    with caplog.at_level(logging.INFO, logger="stepdpo_kernels"):
        pair_loss(*arguments)
    (record,) = [r for r in caplog.records if r.getMessage().startswith("pair_loss")]
    assert record.getMessage().startswith("pair_loss: using torch (not triton: ")
    assert record.levelno == logging.INFO


def test_what_triton_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    token_logps, *rest = _problem(*FORMS["one pair"])
    with pytest.raises(ValueError, match=r"'triton' of pair_loss .* it takes float32, and token_logps is"):
        pair_loss(token_logps.double(), *rest, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="it runs on GPUs, and token_logps is on cpu"):
        pair_loss(*(t.to("cpu") for t in _problem(*FORMS["one pair"])), impl="triton")


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(4), r"token_logps must be \(5,\) float32 or float64, got \(4,\) torch.float32"),
        (0, torch.zeros(5, dtype=torch.bfloat16), "token_logps must be .* torch.bfloat16"),
        (2, torch.zeros(1), r"chosen must be \(P,\) int64, got \(1,\) torch.float32"),
        (2, torch.tensor([2]), r"chosen holds 2, outside the branches 0\.\.1"),
        (3, torch.tensor([-1]), r"rejected holds -1, outside the branches 0\.\.1"),
        (3, torch.zeros(2, dtype=torch.int64), r"rejected must be \(1,\) int64, got \(2,\)"),
        (4, torch.zeros(1), r"ref_logps must be \(2,\), chosen then rejected, got \(1,\)"),
        (5, torch.zeros(2), r"weights must be \(1,\), got \(2,\)"),
        (5, torch.zeros(1, device="meta"), "on one device, got .*, meta"),
    ],
)
def test_bad_input(position: int, wrong: Tensor, message: str) -> None:
    arguments = list(_problem(*FORMS["one pair"]))
    arguments[position] = wrong if wrong.is_meta else wrong.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        pair_loss(*arguments)
