"""Log-probs of the loss tokens, and the preference loss on them, from hidden states: ours beside the peers."""

from __future__ import annotations

from typing import Any

from benchmarks.registry import Case, Provider, Workload

# Hidden size and vocabulary of the heads that Step-DPO is trained with.
HEADS = {
    "SmolLM2-135M": (576, 49_152),
    "Qwen2-0.5B": (896, 151_936),
    "Qwen2-7B": (3584, 152_064),
    "Llama-3-8B": (4096, 128_256),
    "DeepSeekMath-7B": (4096, 102_400),
    "Qwen2-72B": (8192, 152_064),
}
TINY = "tiny"
ANY = "any"  # its size is the case's
SIZE_OF = {**HEADS, TINY: (32, 1_500), ANY: (0, 0)}

_PAIRS = "DPO loss of branches of up to 64 rows, without a reference"
_ROWS = "for any gradient of each row"
PROVIDERS = (
    Provider("products", "floor", "as many plain matrix products as the mode needs, and no loss"),
    Provider("products-onednn", "floor", "the same through oneDNN, whatever torch's BLAS is", devices=("cpu",)),
    Provider("bytes", "floor", "a copy that reads W once and, where there is a dW, writes as much", bound="bytes"),
    Provider("ours", "ours", f"linear_logprob as it comes, {_ROWS}"),
    Provider("ours-memory", "ours", "the C++ operator when it may keep nothing beside dW", devices=("cpu",)),
    Provider("ours-triton-chunked", "ours", "linear_logprob(impl='triton_chunked')", devices=("cuda",)),
    Provider("ours-triton-fused", "ours", "linear_logprob(impl='triton_fused')", devices=("cuda",)),
    Provider("ours-loss", "ours", f"StepDPOLoss: {_PAIRS}", kernel="preference_loss"),
    Provider("eager", "peer", f"F.linear, float(), log_softmax, gather, {_ROWS}"),
    Provider("eager-compiled", "peer", f"torch.compile of eager, {_ROWS}"),
    Provider("trl-selective", "peer", f"TRL's selective_log_softmax on full logits, {_ROWS}", "trl"),
    Provider("trl-chunked", "peer", f"what TRL's add_fused_lm_head computes with, its chunk size, {_ROWS}", "trl"),
    Provider(
        *("liger-dpo", "peer", f"LigerFusedLinearDPOLoss, compiled: {_PAIRS}", "liger-kernel"), kernel="preference_loss"
    ),
    Provider(
        *("cut-cross-entropy", "peer", f"linear_cross_entropy, reduction none, {_ROWS}; torch_compile on CPUs"),
        "cut-cross-entropy",
    ),
    Provider("torch-linear-ce", "peer", f"F.linear_cross_entropy with its defaults, reduction none, {_ROWS}"),
    Provider(
        *("torch-linear-ce-chunked", "peer"),
        f"the same with its own backward, {_ROWS}: chunks as it chooses; on CPUs, where its choice is slow, one",
    ),
    Provider(
        *("quack", "peer", "chunked_linear_cross_entropy, reduction sum: one gradient for all rows"),
        "quack-kernels",
        devices=("cuda",),
        kernel="cross_entropy_sum",
    ),
)
TESTS = ("tests/ops/test_linear_logprob.py",)


def case(head: str, rows: int, device: str, **changes: Any) -> Case:
    hidden, vocab = SIZE_OF[head]
    usual = {"mode": "full", "dtype": "bfloat16", "inputs": "random", "head": head}
    return usual | {"rows": rows, "hidden": hidden, "vocab": vocab, "device": device} | changes


def by_rows(device: str, size: str) -> list[Case]:
    if size == "tiny":
        return [case(TINY, rows, device, dtype="float32") for rows in (16, 32)]
    if device == "cuda":
        rows = {"quick": (1024, 4096, 16_384), "full": (128, 512, 1024, 2048, 4096, 8192, 16_384)}[size]
        heads = {"quick": ("Qwen2-7B",), "full": ("Qwen2-7B", "Llama-3-8B")}[size]
        return [case(head, r, device) for head in heads for r in rows]
    if size == "quick":
        return []
    return [case("SmolLM2-135M", r, device, rounds=n) for r, n in ((128, 7), (512, 5), (1024, 3))]


def by_mode(device: str, size: str) -> list[Case]:
    """What a frozen head and the reference pass save; float32; targets as likely as after training."""
    if size == "tiny":
        return [case(TINY, 64, device, mode="logp", inputs="peaked")]
    head, rows = ("Qwen2-7B", 4096) if device == "cuda" else ("SmolLM2-135M", 128)
    if size == "quick":
        return [case(head, rows, device, mode="frozen", inputs="peaked")] if device == "cuda" else []
    modes = [case(head, rows, device, mode=mode) for mode in ("frozen", "logp")]
    return [*modes, case(head, rows, device, inputs="peaked"), case(head, rows, device, dtype="float32")]


def by_head(device: str, size: str) -> list[Case]:
    if size == "tiny":
        return []
    if device == "cuda":
        return [case(head, 4096, device) for head in (HEADS if size == "full" else ("Llama-3-8B",))]
    heads = {"quick": {"SmolLM2-135M": (128, 7)}, "full": {"Qwen2-0.5B": (128, 5), "Qwen2-7B": (64, 3)}}[size]
    return [case(head, rows, device, rounds=rounds) for head, (rows, rounds) in heads.items()]


def by_vocabulary(device: str, size: str) -> list[Case]:
    if size != "full":
        return []
    if device == "cuda":
        return [case(ANY, 4096, device, hidden=4096, vocab=vocab) for vocab in (32_768, 131_072, 262_144)]
    return [case(ANY, 128, device, hidden=576, vocab=v, rounds=n) for v, n in ((32_768, 7), (131_072, 3))]


def _workload(name: str, title: str, x: str, x_label: str, cases: Any, all_of_them: bool = True) -> Workload:
    """all_of_them: with the configurations that are not the fastest ones of their kind"""
    kinds = ("dtype", "mode", "hidden", "inputs")
    providers = tuple(p for p in PROVIDERS if all_of_them or p.name not in SLOWER)
    dry = ("products", "ours", "ours-triton-chunked", "ours-triton-fused", "eager") if name == "head-rows" else ()
    return Workload(name, "head", "linear_logprob", title, x, x_label, cases, providers, kinds, TESTS, dry=dry)


SLOWER = ("ours-memory", "eager-compiled", "torch-linear-ce-chunked")
WORKLOADS = (
    _workload("head-rows", "The head against its rows", "rows", "loss rows R", by_rows),
    _workload(
        "head-modes", "The head frozen, without gradients, after training", "rows", "loss rows R", by_mode, False
    ),
    _workload("head-models", "The heads of known models", "vocab", "vocabulary V", by_head, False),
    _workload("head-vocabulary", "The head against its vocabulary", "vocab", "vocabulary V", by_vocabulary, False),
)
