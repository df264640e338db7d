"""Attention of one layer along shared prefixes: ours beside what trainers do today."""

from __future__ import annotations

from typing import Any

from benchmarks.registry import Case, Provider, Workload

# Heads, key and value heads, head dimension.
HEADS = {"Qwen2-0.5B": (14, 2, 64), "Qwen2-7B": (28, 4, 128), "tiny": (4, 2, 16)}

_UNSHARED = "each branch with a copy of its prefix"
PROVIDERS = (
    Provider("products", "floor", "one large matrix product of as many operations as visible (query, key) pairs need"),
    Provider("bytes", "floor", "a copy of queries, keys, values, outputs and gradients, each once", bound="bytes"),
    Provider("ours", "ours", "tree_attention as it comes, every common prefix once"),
    Provider("ours-pair", "ours", "the same, prefixes shared within pairs alone"),
    Provider("ours-none", "ours", f"the same, {_UNSHARED}"),
    Provider("ours-flash", "ours", "tree_attention(impl='flash')", "flash-attn", devices=("cuda",)),
    Provider("ours-varlen", "ours", "tree_attention(impl='varlen')", devices=("cuda",)),
    Provider("ours-triton", "ours", "tree_attention(impl='triton')", devices=("cuda",)),
    Provider("ours-flex", "ours", "tree_attention(impl='flex')", devices=("cuda",)),
    Provider("padded-sdpa", "peer", f"causal SDPA on a right-padded batch, {_UNSHARED}: what trainers do"),
    Provider("unshared-sdpa", "peer", f"causal SDPA on each sequence, {_UNSHARED}"),
    Provider("unshared-varlen", "peer", f"torch's varlen_attn (FlashAttention), {_UNSHARED}", devices=("cuda",)),
    Provider(
        *("unshared-flash-attn", "peer", f"flash_attn_varlen_func, {_UNSHARED}", "flash-attn"), devices=("cuda",)
    ),
    Provider(
        *("flex-shared-prefix", "peer"),
        "FlexAttention, compiled, prefixes shared within pairs by a block mask that is made outside of the time",
    ),
    Provider("dense-sdpa", "peer", "one SDPA call with a mask of all tokens by all tokens, every common prefix once"),
)  # fmt: skip
TESTS = ("tests/ops/test_tree_blocks.py",)


def case(device: str, heads: str = "", **changes: Any) -> Case:
    heads = heads or ("Qwen2-7B" if device == "cuda" else "Qwen2-0.5B")
    return {"mode": "full", "dtype": "bfloat16", "heads": heads, "device": device, **changes}


def by_prefix(device: str, size: str) -> list[Case]:
    shape: Case = {"lengths": "made", "branch": 64, "prefixes": 2, "pairs_per_prefix": 2}
    if size == "tiny":
        small: Case = shape | {"branch": 8, "dtype": "float32"}
        return [case(device, "tiny", prefix=n, **small) for n in (16,)]
    prefixes = {
        ("cuda", "quick"): (1024, 8192),
        ("cuda", "full"): (256, 1024, 4096, 8192, 16_384, 32_768),
        ("cpu", "quick"): (128, 512),
        ("cpu", "full"): (256, 1024, 2048),
    }[device, size]
    few: Case = {"rounds": 5} if device == "cpu" and size == "full" else {}
    found = [case(device, prefix=n, **shape, **few) for n in prefixes]
    if size == "full":
        found += [case(device, prefix=n, **shape, **few, mode="forward") for n in prefixes[:4]]
    return found


def by_branches(device: str, size: str) -> list[Case]:
    if size != "full":
        return []
    shape: Case = {"lengths": "made", "branch": 64, "prefixes": 1}
    shape |= {"prefix": 4096} if device == "cuda" else {"prefix": 256, "rounds": 5}
    return [case(device, pairs_per_prefix=n, **shape) for n in (1, 4, 16)]


def by_pairs(device: str, size: str) -> list[Case]:
    if size == "tiny":
        return [case(device, "tiny", lengths="real", pairs=4, mode="forward", dtype="float32")]
    pairs = {
        ("cuda", "quick"): (64,),
        ("cuda", "full"): (16, 64, 256),
        ("cpu", "quick"): (16,),
        ("cpu", "full"): (8, 32),
    }[device, size]
    return [case(device, lengths="real", pairs=n) for n in pairs]


def _workload(name: str, title: str, x: str, x_label: str, cases: Any) -> Workload:
    kinds = ("dtype", "mode", "heads")
    dry = ("products", "ours", "ours-triton", "padded-sdpa") if name == "attention-prefix" else ()
    return Workload(name, "attention", "tree_attention", title, x, x_label, cases, PROVIDERS, kinds, TESTS, dry=dry)


WORKLOADS = (
    _workload(
        "attention-prefix", "Attention against the length of prefixes", "prefix", "tokens of a prefix", by_prefix
    ),
    _workload(
        *("attention-branches", "Attention against pairs of one prefix", "pairs_per_prefix", "pairs of a prefix"),
        by_branches,
    ),
    _workload("attention-pairs", "Attention over pairs of real lengths", "pairs", "pairs", by_pairs),
)
