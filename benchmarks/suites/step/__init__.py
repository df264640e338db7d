"""A whole model's forward and backward on pairs, and whole training steps beside TRL's."""

from __future__ import annotations

from typing import Any

from benchmarks.registry import Case, Provider, Workload

MODEL_PROVIDERS = (
    Provider(
        "products", "floor", "matrix products of all linear layers over tokens held once, of the head over its rows"
    ),
    Provider("ours", "ours", "packed forests, every common prefix encoded once (share tree), StepDPOLoss"),
    Provider("ours-pair", "ours", "the same, prefixes shared within pairs (share pair)"),
    Provider("ours-none", "ours", "the same, nothing shared (share none): packing without padding, and our head"),
    Provider("padded", "peer", "transformers' model on padded batches sorted by length, full logits, cross entropy"),
    Provider("padded-rows", "peer", "the same, with the head on labelled tokens alone"),
)
TRAINING_PROVIDERS = (
    Provider("products", "floor", "matrix products over the step's tokens held once: reference, forward, backward"),
    Provider("ours", "ours", "StepDPOTrainer, pairs drawn at random"),
    Provider("ours-grouped", "ours", "the same, pairs drawn problem by problem: fewer tokens than the floor has"),
    Provider("ours-pair", "ours", "the same as ours, prefixes shared within pairs alone"),
    Provider("ours-none", "ours", "the same as ours, nothing shared"),
    Provider(
        *("trl", "peer", "DPOTrainer, up to 8 pairs in a forward pass, reference precomputed, its fused head"), "trl"
    ),
    Provider("trl-sorted", "peer", "the same, pairs of a step sorted by length so that they pad little", "trl"),
    Provider("trl-1", "peer", "the same, one pair in a forward pass: next to no padding, and least memory", "trl"),
    Provider("trl-32", "peer", "the same as trl-sorted with 32 pairs in a forward pass", "trl", devices=("cuda",)),
    Provider("trl-packed", "ours", "TRL's trainer as in trl, with stepdpo_kernels.integrations.trl", "trl"),
)  # fmt: skip
TESTS = ("tests/invariants/test_i2_zero_margin.py",)


def case(device: str, model: str, **changes: Any) -> Case:
    usual = {"mode": "full", "dtype": "bfloat16", "model": model, "device": device, "max_tokens": 4096}
    return {**usual, **changes}


def tiny(device: str, **changes: Any) -> Case:
    return case(device, "tiny", dtype="float32", max_tokens=1200, **changes)


def by_pairs(device: str, size: str) -> list[Case]:
    if size == "tiny":
        return [tiny(device, lengths="real", pairs=4)]
    if device == "cuda" and size == "quick":  # small enough for all providers to be there at once, with full logits
        return [case(device, "Qwen2-0.5B", lengths="real", pairs=128, max_tokens=8192)]
    if device == "cuda":
        of = {"lengths": "real", "max_tokens": 8192, "alone": True}
        found = [case(device, "Qwen2-1.5B", pairs=n, **of) for n in (16, 64, 256, 1024)]
        return found + [case(device, "Qwen2-7B", mode="lora", checkpointing=True, pairs=n, **of) for n in (64, 256)]
    pairs = {"quick": {4: 5}, "full": {4: 5, 16: 3}}[size]
    return [case(device, "llama-21M", lengths="real", pairs=n, rounds=rounds) for n, rounds in pairs.items()]


def by_prefix(device: str, size: str) -> list[Case]:
    if size == "tiny":
        return []
    model = {"cpu": "llama-21M", "cuda": "Qwen2-0.5B" if size == "quick" else "Qwen2-1.5B"}[device]
    prefixes = {
        ("cuda", "quick"): (1024, 4096),
        ("cuda", "full"): (256, 1024, 4096, 16_384, 32_768),
        ("cpu", "quick"): (),
        ("cpu", "full"): (128, 512),
    }[device, size]
    shape = {"lengths": "made", "branch": 64, "pairs_per_prefix": 2} | at_once(model)
    return [case(device, model, prefix=n, max_tokens=max(4096, 2 * (n + 64)), **shape) for n in prefixes]


def by_branches(device: str, size: str) -> list[Case]:
    if size != "full":
        return []
    model = "Qwen2-1.5B" if device == "cuda" else "llama-21M"
    of = at_once(model)
    pairs = 2 * of["pairs"]
    shape = {"lengths": "made", "branch": 64, "prefix": 512 if device == "cuda" else 128, **of, "pairs": pairs}
    return [case(device, model, pairs_per_prefix=n, **shape) for n in (1, pairs // 4, pairs)]


def at_once(model: str) -> dict[str, Any]:
    """Pairs, and how they are measured, of a model's scaling."""
    if model == "llama-21M":
        return {"pairs": 4, "rounds": 3}
    # A GPU has no room for six of the larger model, with gradients and full logits.
    return {"pairs": 8} | ({"alone": True} if model == "Qwen2-1.5B" else {})


def training(device: str, size: str) -> list[Case]:
    """pairs: made-up ones to draw from, where no data is named."""
    if size == "tiny":
        return [tiny(device, pairs_per_step=8, pairs=256, rounds=2)]
    if device == "cuda" and size == "quick":  # small enough for all trainers to be there at once
        return [case(device, "Qwen2-0.5B", pairs_per_step=64, pairs=512, max_tokens=16_384, rounds=3)]
    if device == "cuda":
        of = {"pairs_per_step": 128, "pairs": 1536, "max_tokens": 16_384, "rounds": 5}
        return [case(device, "Qwen2-1.5B", alone=True, **of)]
    if size == "quick":
        return [case(device, "llama-21M", pairs_per_step=4, pairs=256, max_tokens=2048, rounds=5)]
    # 24 GB have no room for TRL's eight pairs, 11 GB, beside all other trainers.
    return [case(device, "SmolLM2-135M", pairs_per_step=8, pairs=256, max_tokens=2048, rounds=3, alone=True)]


def training_lora(device: str, size: str) -> list[Case]:
    if size != "full":
        return []
    if device == "cuda":
        of = {"checkpointing": True, "pairs_per_step": 128, "pairs": 1024, "max_tokens": 16_384, "rounds": 3}
        return [case(device, "Qwen2-7B", mode="lora", alone=True, **of)]
    return [case(device, "SmolLM2-135M", mode="lora", pairs_per_step=4, pairs=256, max_tokens=2048, rounds=2)]


def _model(name: str, title: str, x: str, x_label: str, cases: Any, with_x: tuple[str, ...] = ()) -> Workload:
    dry = ("products", "ours", "padded-rows") if name == "model-pairs" else ()
    of = (name, "step", "forward_backward", title, x, x_label, cases, MODEL_PROVIDERS)
    return Workload(*of, with_x=with_x, tests=TESTS, dry=dry)


def _training(name: str, title: str, cases: Any) -> Workload:
    return Workload(
        *(name, "step", "training_step", title, "pairs_per_step", "pairs of an optimiser step"),
        *(cases, TRAINING_PROVIDERS),
        kinds=("mode",),
        tests=TESTS,
        runner="benchmarks.suites.step.trainers",
        dry=("products", "ours", "trl") if name == "step-training" else (),
    )


WORKLOADS = (
    _training("step-training", "Training all weights: reference, forward, backward, optimiser", training),
    _training("step-lora", "Training an adapter of rank 16", training_lora),
    _model("model-pairs", "A model's forward and backward against its pairs", "pairs", "pairs", by_pairs),
    _model(
        *("model-prefix", "The same against the length of prefixes, batches of a pair or 4,096 tokens", "prefix"),
        "tokens of a prefix",
        by_prefix,
        with_x=("max_tokens",),
    ),
    _model(
        *("model-branches", "The same against pairs of one prefix", "pairs_per_prefix", "pairs of a prefix"),
        by_branches,
    ),
)
