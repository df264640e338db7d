"""On a CUDA device: I1, I2 and I3, then what exists only there against the definitions; the quickest first."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from stepdpo_kernels import use_impl
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import packed_forward
from stepdpo_kernels.ops.linear_logprob import grouped_logprob, linear_logprob, linear_loss
from stepdpo_kernels.ops.ragged import segment_sum
from stepdpo_kernels.ops.tree_attention import tree_attention
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.trainer import StepDPOConfig
from stepdpo_kernels.trainer.acceleration import accelerate_layers
from tests.forests import forest_pairs, make_pair
from tests.numerics import assert_as_good_as_eager, eager_logprob

pytestmark = pytest.mark.gpu
Make = Callable[..., PreTrainedModel]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_ligers_layers_under_our_attention_and_head(
    tiny_model: Make, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    module = sys.modules[type(tiny_model(kind)).__module__]  # in which Liger replaces names for all models to come
    for name in [n for n in vars(module) if n == "apply_rotary_pos_emb" or n.endswith(("RMSNorm", "MLP"))]:
        monkeypatch.setattr(module, name, getattr(module, name))
    plain, fast = tiny_model(kind).cuda(), tiny_model(kind).cuda()
    args = StepDPOConfig(output_dir=str(tmp_path), use_liger_kernel=True)
    with use_impl(tree_attention="reference"):  # varlen takes no float32
        expected = _step(plain, "none")
        accelerate_layers(fast, args)
        for ours, true in zip(_step(fast, "tree"), expected, strict=True):
            assert (ours - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("of_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3, 7), (8, 128)], ids=str)
def test_segment_sums(shape: tuple[int, ...], of_dtype: str) -> None:
    dtype = DTYPES[of_dtype]
    lengths = torch.tensor([1, 0, 3000, 7, 2], device="cuda")
    index = torch.randint(500, (int(lengths.sum()),), device="cuda")
    x = torch.randn(500, *shape, device="cuda").to(dtype)
    owner = torch.arange(5, device="cuda").repeat_interleave(lengths)
    exact = torch.zeros(5, *shape, dtype=torch.float64, device="cuda").index_add_(0, owner, x.double()[index])
    sums = {}
    for impl in ("triton", "torch"):
        with use_impl(segment_sum=impl):
            sums[impl] = segment_sum(x, index, lengths)
            assert torch.equal(segment_sum(x, index, lengths), sums[impl])
        error = (sums[impl].double() - exact).abs().max()
        assert error <= (torch.finfo(dtype).eps + 3000 * torch.finfo(torch.float32).eps) * exact.abs().max()


def test_a_target_outside_the_vocabulary_stops_the_device() -> None:
    """In a process of its own: a device-side assertion ends the context."""
    import subprocess

    code = (
        "import torch; from stepdpo_kernels import linear_logprob as f\n"
        "f(torch.ones(1, 8, device='cuda'), torch.ones(5, 8, device='cuda'), torch.tensor([5], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "outside the vocabulary" in done.stderr


HEADS = {  # rows, hidden size, vocabulary: aligned or not, and more rows than Q is kept of
    "aligned": (300, 128, 5000),
    "odd": (300, 67, 5003),
    "many rows": (5000, 64, 5003),
    "one row": (1, 96, 4099),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"softcap": 20.0, "logit_scale": 0.5, "bias": True},
}
# Kernels and tiles depend on dtype, alignment and options; on the number of rows only which of them run.
HEAD_CASES = [
    *itertools.product(DTYPES, ("aligned", "odd"), ("plain", "all")),
    *(
        ("bfloat16", shape, name)
        for shape, name in (("many rows", "plain"), ("many rows", "all"), ("one row", "plain"))
    ),
    ("bfloat16", "aligned", "bias"),
]


@pytest.mark.parametrize(("of_dtype", "shape", "name"), HEAD_CASES)
@pytest.mark.parametrize("impl", ["chunked", "triton_chunked", "triton_fused"])
def test_heads_are_as_good_as_eager(impl: str, of_dtype: str, shape: str, name: str) -> None:
    rows, size, vocabulary = HEADS[shape]
    dtype, options = DTYPES[of_dtype], OPTIONS[name]
    rest = {key: value for key, value in options.items() if key != "bias"}
    results = {}
    for way, of in (("ours", dtype), ("eager", dtype), ("oracle", torch.float64)):
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias = (
            torch.randn(*s, generator=generator).to(dtype).to("cuda", of)
            for s in ((rows, size), (vocabulary, size), (vocabulary,))
        )
        target = torch.randint(vocabulary, (rows,), generator=generator).cuda()
        upstream = torch.randn(rows, generator=generator).to("cuda", torch.promote_types(of, torch.float32))
        inputs = [x.requires_grad_() for x in (hidden, weight, bias)][: 3 if "bias" in options else 2]
        arguments = {"bias": bias if "bias" in options else None, **rest}
        if way == "ours":
            logps = linear_logprob(hidden, weight, target, impl=impl, **arguments)
        else:
            logps = eager_logprob(hidden, weight, target, **arguments)
        results[way] = [logps.detach(), *torch.autograd.grad(logps, inputs, upstream)]
    for what, *of_all in zip(("log-probs", "dX", "dW", "db"), *results.values(), strict=False):
        assert_as_good_as_eager(what, *of_all, dtype)


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("vocabulary", [20_001, 20_016])  # accesses of one element, and wide ones
@pytest.mark.parametrize("impl", ["triton_chunked", "triton_fused"])
def test_heads_give_the_same_bits_with_and_without_gradients(impl: str, vocabulary: int, scale: float) -> None:
    hidden, weight = (scale * torch.randn(n, 256, device="cuda").bfloat16() for n in (5000, vocabulary))
    target = torch.randint(vocabulary, (5000,), device="cuda")
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        logps = linear_logprob(*leaves, target, impl=impl)
        results.append([logps.detach(), *torch.autograd.grad(logps.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(linear_logprob(hidden, weight, target, impl=impl), results[0][0])


@pytest.mark.parametrize("impl", ["triton_chunked", "triton_fused"])
def test_heads_need_no_full_logits(impl: str) -> None:
    rows, size, vocabulary = 32_768, 256, 50_000
    hidden, weight = (
        torch.randn(n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (rows, vocabulary)
    )
    target = torch.randint(vocabulary, (rows,), device="cuda")
    linear_logprob(hidden, weight, target, impl=impl).sum().backward()  # what libraries set up once
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, target, impl=impl).sum().backward()
    used = torch.cuda.max_memory_allocated() - before
    sums = 12 * rows * size + 2 * weight.nbytes
    allowed = {"triton_chunked": (6 * 1024 + 2 * 4096) * vocabulary, "triton_fused": 32 << 20}[impl]
    assert used < 1.1 * (allowed + sums)
    assert 1.1 * (allowed + sums) < 4 * rows * vocabulary / 3


@pytest.mark.parametrize("of_dtype", ["float32", "bfloat16"])
def test_a_loss_of_many_rows_takes_its_gradients_in_forward(of_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of at most 4,096 rows (float32: 2,048), without a wait, and with the bits that a reference gets."""
    rows, size, vocabulary, dtype = 6000, 64, 5003, DTYPES[of_dtype]
    ends = range(60, rows + 1, 60)
    monkeypatch.setattr("stepdpo_kernels.ops.linear_logprob.triton_chunked.LEAST_WORK", 0)
    signs = torch.tensor([1.0, -1.0], device="cuda").repeat_interleave(30).repeat(rows // 60)
    target = torch.randint(vocabulary, (rows,), device="cuda")
    made = [torch.randn(n, size, device="cuda").to(dtype) / scale for n, scale in ((rows, 1), (vocabulary, 8))]

    def loss_of(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        margins = (signs.to(logps.dtype) * logps).view(-1, 60).sum(dim=1)
        return -torch.nn.functional.logsigmoid(0.1 * margins).mean(), logps.detach()

    results = []
    for way, of in (("ours", dtype), ("eager", dtype), ("oracle", torch.float64)):
        leaves = [x.to(of, copy=True).requires_grad_() for x in made]
        if way == "ours":
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss, logps = linear_loss(leaves[0], leaves[1], target, ends, loss_of, impl="triton_chunked")
                gradients = torch.autograd.grad(loss, leaves)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert type(loss.grad_fn).__name__ == "ReadyBackward"
            with torch.no_grad():
                again = grouped_logprob(*made, target, ends, impl="triton_chunked")
            assert torch.equal(again, logps)
        else:
            loss, _ = loss_of(eager_logprob(*leaves, target))
            gradients = torch.autograd.grad(loss, leaves)
        results.append([loss.detach(), *gradients])
    for what, *of_all in zip(("loss", "dX", "dW"), *results, strict=True):
        assert_as_good_as_eager(what, *of_all, dtype)


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


def _attention_results(
    impl: str, dtype: torch.dtype, sizes: tuple[int, int], sinks: bool, **options: Any
) -> dict[str, list[torch.Tensor]]:
    pairs = forest_pairs()
    plan = build_batch(pairs, range(len(pairs)), "tree").plan.to("cuda")
    results = {}
    for name, by, of in (("ours", impl, dtype), ("eager", "reference", dtype), ("oracle", "reference", torch.float64)):
        generator = torch.Generator().manual_seed(0)
        shapes = [(plan.num_tokens, h, s) for h, s in ((8, sizes[0]), (2, sizes[0]), (2, sizes[1]), (8, sizes[1]))]
        tensors = [torch.randn(*s, generator=generator).to(dtype).to("cuda", of) for s in [*shapes, (8,)]]
        *inputs, upstream, sink = tensors
        inputs = [x.requires_grad_() for x in ([*inputs, sink] if sinks else inputs)]
        sink_option = {"sinks": inputs[3]} if sinks else {}
        output = tree_attention(*inputs[:3], plan, scale=sizes[0] ** -0.5, impl=by, **options, **sink_option)
        results[name] = [output.detach(), *torch.autograd.grad(output, inputs, upstream)]
    return results


# Each backend is held against the definition once more before its first use, for each option alone (selftest.py), so
# that options together are left to float32, and tiles to the test over many of them.
ATTENTION_CASES = [
    *((dtype, 64, 64, {}, False) for dtype in DTYPES),
    *(("bfloat16", *sizes, {}, False) for sizes in ((192, 128), (256, 256))),
    *(("bfloat16", 64, 64, options, False) for options in ({"sliding_window": 5}, {"softcap": 2.0})),
    *(("bfloat16", 64, 64, options, True) for options in ({}, {"sliding_window": 5})),
    ("float32", 64, 64, {"sliding_window": 5, "softcap": 2.0}, True),
]


def _name(case: tuple[str, int, int, dict[str, Any], bool]) -> str:
    dtype, size, of_values, options, sinks = case
    return "-".join([dtype, f"{size}x{of_values}", *options, *(["sinks"] if sinks else [])])


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=_name)
@pytest.mark.parametrize("impl", ["triton", "flash", "varlen", "flex"])
def test_attention_backends_are_as_good_as_eager(impl: str, case: tuple[str, int, int, dict[str, Any], bool]) -> None:
    of_dtype, *sizes, options, sinks = case
    dtype = DTYPES[of_dtype]
    if impl == "flex":
        torch.compiler.reset()  # each case compiles anew, and torch refuses after a few
    try:
        results = _attention_results(impl, dtype, tuple(sizes), sinks, **options)
    except ValueError as refusal:
        if "self-test" in str(refusal):
            raise
        pytest.skip(str(refusal))
    for what, *of_all in zip(("output", "dQ", "dK", "dV", "d sinks"), *results.values(), strict=False):
        assert_as_good_as_eager(what, *of_all, dtype)


@pytest.mark.parametrize("impl", ["triton", "flash", "varlen"])
def test_attention_backends_give_the_same_bits(impl: str) -> None:
    try:
        first = _attention_results(impl, torch.bfloat16, (64, 64), True)["ours"]
    except ValueError as refusal:
        pytest.skip(str(refusal))
    for _ in range(3):
        again = _attention_results(impl, torch.bfloat16, (64, 64), True)["ours"]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


ALL = {"sliding_window": 100, "softcap": 20.0}  # and sinks
TILES = [  # each configuration of the tables, and sizes that are no power of two
    *(("bfloat16", size, {}) for size in (16, 80, 128, 256)),
    *(("float32", size, {}) for size in (16, 128, 256)),
    ("bfloat16", 80, ALL),
    ("bfloat16", 256, ALL),
    ("float32", 128, ALL),
]


@pytest.mark.parametrize(
    ("of_dtype", "size", "options"), TILES, ids=lambda x: ("all" if x else "plain") if isinstance(x, dict) else None
)
def test_triton_attention_over_many_tiles(of_dtype: str, size: int, options: dict[str, Any]) -> None:
    dtype = DTYPES[of_dtype]
    rng = np.random.default_rng(0)
    prompt, steps = (rng.integers(3, 512, n).tolist() for n in (700, 600))
    cuts = [(at, rng.integers(3, 512, (2, 90)).tolist()) for at in range(0, 600, 60)]
    pairs = [make_pair([*prompt, *steps[:at]], [*steps[at:], 1], wrong) for at, (wrong, _) in cuts]
    pairs += [make_pair([*prompt, *steps[:at]], right, [2]) for at, (_, right) in cuts]
    plan = build_batch(pairs, range(len(pairs)), "tree").plan.to("cuda")
    assert plan.num_tokens > 3000
    sinks = bool(options)
    results = []
    for impl, of in (("triton", dtype), ("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        generator = torch.Generator().manual_seed(0)
        shapes = [*((plan.num_tokens, heads, size) for heads in (7, 1, 1)), (7,), (plan.num_tokens, 7, size)]
        *inputs, upstream = (torch.randn(*s, generator=generator).to(dtype).to("cuda", of) for s in shapes)
        inputs = [x.requires_grad_() for x in inputs[: 4 if sinks else 3]]
        more = {**options, "sinks": inputs[3]} if sinks else options
        output = tree_attention(*inputs[:3], plan, scale=size**-0.5, impl=impl, **more)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, upstream)])
    ours, again, eager, oracle = results
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for what, *of_all in zip(("output", "dQ", "dK", "dV", "d sinks"), ours, eager, oracle, strict=False):
        assert_as_good_as_eager(what, *of_all, dtype)
