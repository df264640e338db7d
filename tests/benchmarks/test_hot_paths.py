"""Our own hot paths under pytest-benchmark: `make test` runs each once on a small case, `make bench` times a real one.

Names are stable, so that `pytest-benchmark compare` finds a path again in another commit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.registry import task_module
from benchmarks.suites.head import case as head_case
from benchmarks.suites.step import case as model_case
from stepdpo_kernels._dispatch import use_impl
from stepdpo_kernels.answers.compare import compare
from stepdpo_kernels.ops.pair_loss import pair_loss
from stepdpo_kernels.packing import pack_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD = ("Qwen2-7B", 4096) if DEVICE == "cuda" else ("SmolLM2-135M", 512)
MODEL = "Qwen2-0.5B" if DEVICE == "cuda" else "llama-21M"

# suite, provider, changes of its case where it is timed; a head in the implementation after the @, where there is one.
PATHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "head-full": ("head", "ours", {}),
    "head-frozen": ("head", "ours", {"mode": "frozen"}),
    "head-logp": ("head", "ours", {"mode": "logp"}),
    "head-full-float32": ("head", "ours", {"dtype": "float32"}),
    "head-full@chunked": ("head", "ours", {}),
    "head-full@reference": ("head", "ours", {}),
    "head-logp@reference": ("head", "ours", {"mode": "logp"}),
    "preference-loss": ("head", "ours-loss", {}),
    "attention-full": ("attention", "ours", {}),
    "attention-forward": ("attention", "ours", {"mode": "forward"}),
    "model-tree": ("step", "ours", {}),
    "load": ("data", "ours", {"of": "records", "pairs": 256}),
    "pack-tree": ("data", "ours", {"of": "pairs", "pairs": 1024}),
    "pack-pair": ("data", "ours-pair", {"of": "pairs", "pairs": 1024}),
    "pack-none": ("data", "ours-none", {"of": "pairs", "pairs": 1024}),
}
if DEVICE == "cuda":
    PATHS |= {
        f"head-{mode}@{impl}": ("head", "ours", {"mode": mode})
        for mode in ("full", "logp")
        for impl in ("triton_chunked", "triton_fused")
    }


def case_of(suite: str, small: bool) -> dict[str, Any]:
    if suite == "head":
        return head_case("tiny", 32, DEVICE, dtype="float32") if small else head_case(*HEAD, DEVICE)
    if suite == "attention":
        usual = {"mode": "full", "device": DEVICE, "lengths": "real"}
        if small:
            return usual | {"dtype": "float32", "heads": "tiny", "pairs": 2}
        return usual | {"dtype": "bfloat16", "heads": "Qwen2-7B" if DEVICE == "cuda" else "Qwen2-0.5B", "pairs": 32}
    if suite == "step":
        of = {"lengths": "real", "max_tokens": 4096}
        if small:
            return model_case(DEVICE, "tiny", dtype="float32", pairs=2, **of)
        return model_case(DEVICE, MODEL, pairs=32, **of)
    return {"mode": "host", "device": "cpu", "lengths": "real"}


@pytest.mark.parametrize("name", list(PATHS))
def test_path(name: str, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Right first, then timed."""
    suite, provider, changes = PATHS[name]
    benchmark.group = suite
    case = case_of(suite, small=not benchmark.enabled) | changes
    if not benchmark.enabled and "pairs" in changes:
        case["pairs"] = 8
    module = task_module(suite)
    with use_impl(linear_logprob=name.partition("@")[2] or "auto"):
        errors = module.errors(provider, case)
        assert errors
        assert all(error <= module.tolerance(case) for error in errors.values()), errors
        module.prepare(case, tmp_path)
        task = module.load(provider, case, tmp_path)

        def run() -> Any:
            outputs = task.run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return outputs

        run()
        benchmark(run)


def test_pair_loss(benchmark: BenchmarkFixture) -> None:
    """Forward and backward over the pairs of one batch."""
    from benchmarks.lengths import draw_lengths, pairs_of

    benchmark.group = "loss"
    pairs = pairs_of(draw_lengths(256 if benchmark.enabled else 8), 1000)
    batch = pack_pairs(pairs, 10**9)[0].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    logps = (-torch.rand(batch.num_rows, generator=generator)).to(DEVICE).requires_grad_()
    reference = torch.zeros(2 * batch.num_pairs, device=DEVICE)

    def run() -> torch.Tensor:
        found = pair_loss(logps, batch.branches, batch.chosen, batch.rejected, reference, batch.weights, beta=0.4)
        (gradient,) = torch.autograd.grad(found.losses.sum(), logps)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return gradient

    gradient = benchmark(run)
    sums = torch.stack([logps[i].sum() for i in batch.branches.index.split(batch.branches.lengths.tolist())])
    margins = 0.4 * (sums[batch.chosen] - sums[batch.rejected])
    (expected,) = torch.autograd.grad(torch.nn.functional.softplus(-margins).sum(), logps)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_answers(benchmark: BenchmarkFixture) -> None:
    """Comparing what needs no computer algebra: what almost all answers of grade-school problems are."""
    benchmark.group = "answers"
    pairs = [("1,234", "1234.0"), ("$5", "5 dollars"), ("3/4", "0.75"), ("\\frac{1}{2}", "0.5"), ("18", "81")]
    found = benchmark(lambda: [compare(gold, prediction) for gold, prediction in pairs])
    assert found == [True, True, True, True, False]
