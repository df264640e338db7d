"""On a CUDA device: what exists only there against the definitions, and I1, I2 and I3."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from stepdpo_kernels import use_impl
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import packed_forward
from stepdpo_kernels.ops.linear_logprob import linear_logprob
from stepdpo_kernels.ops.tree_attention import tree_attention
from stepdpo_kernels.packing import build_batch
from tests.forests import forest_pairs
from tests.numerics import assert_as_good_as_eager

pytestmark = pytest.mark.gpu
Make = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 128])
def test_varlen_attention_is_as_good_as_eager(head_size: int, dtype: torch.dtype, window: int | None) -> None:
    pairs = forest_pairs()
    plan = build_batch(pairs, range(len(pairs)), "tree").plan.to("cuda")
    results = {}
    for name, impl, of in (
        ("ours", "varlen", dtype),
        ("eager", "reference", dtype),
        ("oracle", "reference", torch.float64),
    ):
        generator = torch.Generator().manual_seed(0)
        q, k, v, upstream = (
            torch.randn(plan.num_tokens, heads, head_size, generator=generator).to(dtype).to("cuda", of)
            for heads in (8, 2, 2, 8)
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        output = tree_attention(*inputs, plan, scale=head_size**-0.5, sliding_window=window, impl=impl)
        results[name] = [output.detach(), *torch.autograd.grad(output, inputs, upstream)]
    for what, ours, eager, oracle in zip(("output", "dQ", "dK", "dV"), *results.values(), strict=True):
        assert_as_good_as_eager(what, ours, eager, oracle, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_head_is_as_good_as_eager(dtype: torch.dtype) -> None:
    results = {}
    for name, impl, of in (
        ("ours", "chunked", dtype),
        ("eager", "reference", dtype),
        ("oracle", "reference", torch.float64),
    ):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 96, generator=generator).to(dtype).to("cuda", of) for n in (300, 5003))
        target = torch.randint(5003, (300,), generator=generator).cuda()
        upstream = torch.randn(300, generator=generator).to("cuda", torch.promote_types(of, torch.float32))
        inputs = [x.requires_grad_() for x in (hidden, weight)]
        logps = linear_logprob(*inputs, target, impl=impl)
        results[name] = [logps.detach(), *torch.autograd.grad(logps, inputs, upstream)]
    for what, ours, eager, oracle in zip(("log-probs", "dX", "dW"), *results.values(), strict=True):
        assert_as_good_as_eager(what, ours, eager, oracle, dtype)


def _step(model: PreTrainedModel, share: str, ref_logps: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Loss and gradients of one forest on the model's device."""
    pairs = forest_pairs()
    batch = build_batch(pairs, range(len(pairs)), share).to("cuda")
    head = model.get_output_embeddings().weight
    loss = StepDPOLoss(reference_free=ref_logps is None)
    model.zero_grad()
    output = loss.packed(packed_forward(model, batch), head, batch, ref_logps)
    output.loss.backward()
    return [output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_i1_float32_sharing_changes_no_gradient(tiny_model: Make, kind: str) -> None:
    model = tiny_model(kind).cuda()
    with use_impl(tree_attention="reference"):  # varlen takes no float32
        for ours, plain in zip(_step(model, "tree"), _step(model, "none"), strict=True):
            assert (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_i1_bfloat16_sharing_is_as_good_as_unshared(tiny_model: Make, kind: str) -> None:
    low = tiny_model(kind).to("cuda", torch.bfloat16)
    exact = tiny_model(kind).to(torch.bfloat16).to("cuda", torch.float64)
    with use_impl(tree_attention="reference"):
        oracle = _step(exact, "none")
    for ours, unshared, true in zip(_step(low, "tree"), _step(low, "none"), oracle, strict=True):
        assert_as_good_as_eager("gradient", ours, unshared, true, torch.bfloat16)


def test_i2_equal_weights_give_a_margin_of_exactly_zero(tiny_model: Make) -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    pairs = forest_pairs()
    batch = build_batch(pairs, range(len(pairs)), "tree").to("cuda")
    head, loss = model.get_output_embeddings().weight, StepDPOLoss()
    with torch.no_grad():
        ref_logps = loss.packed_logps(packed_forward(model, batch), head, batch)
    output = loss.packed(packed_forward(model, batch), head, batch, ref_logps)
    assert (output.margins == 0).all()


def test_i3_the_same_step_gives_the_same_bits(tiny_model: Make) -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    for one, other in zip(_step(model, "tree"), _step(model, "tree"), strict=True):
        assert torch.equal(one, other)


def test_a_target_outside_the_vocabulary_stops_the_device() -> None:
    """In a process of its own: a device-side assertion ends the context."""
    import subprocess
    import sys

    code = (
        "import torch; from stepdpo_kernels import linear_logprob as f\n"
        "f(torch.ones(1, 8, device='cuda'), torch.ones(5, 8, device='cuda'), torch.tensor([5], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "outside the vocabulary" in done.stderr
