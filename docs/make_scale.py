"""Prints the tables of docs/scale.md: what training takes of each GPU, by stepdpo_kernels/trainer/memory.py.

python docs/make_scale.py
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from stepdpo_kernels.trainer.memory import MemoryPlan, ModelSizes, plan_memory

GIB = 2**30
# Of the released configurations.
CONFIGS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
    ),
    "Qwen2-7B": Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=28,
        intermediate_size=18_944,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
    "Qwen2-72B": Qwen2Config(
        hidden_size=8192,
        num_hidden_layers=80,
        intermediate_size=29_568,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
}
GPUS = {"80 GB": 79, "141 GB": 139}  # GiB that such a device reports
ROOM = 0.9  # of it for what is counted
TOKENS, ROWS = 8192, 2048  # of the largest forward pass: the default budget, and a quarter of it predicted from
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # of which the default of 128 pairs a step is a multiple


@cache
def sizes(name: str, trained: str) -> ModelSizes:
    """Of a model on the meta device: in float32 for "full", in bfloat16 with adapters in float32 for "LoRA"."""
    with torch.device("meta"):
        dtype = torch.bfloat16 if trained == "LoRA" else torch.float32
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
        if trained == "LoRA":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return ModelSizes.of(model)


def plan(name: str, trained: str, sharding: str, gpus: int, *, checkpointing: bool) -> MemoryPlan:
    return plan_memory(
        sizes(name, trained),
        max_tokens=TOKENS,
        max_rows=ROWS,
        world_size=gpus,
        sharding=sharding,
        checkpointing=checkpointing,
    )


def fewest(name: str, trained: str, gpu: str) -> tuple[str, int, bool, MemoryPlan]:
    """(sharding, GPUs, checkpointing, plan) of the fewest GPUs that hold it, without checkpointing if they do."""
    for gpus in COUNTS:
        sharding = "none" if gpus == 1 else "fsdp"
        for checkpointing in (False, True):
            found = plan(name, trained, sharding, gpus, checkpointing=checkpointing)
            if found.total <= ROOM * GPUS[gpu] * GIB:
                return sharding, gpus, checkpointing, found
    raise ValueError(f"{name} does not fit on {COUNTS[-1]} GPUs of {gpu}")


def table() -> str:
    """The fewest GPUs for each model, kind of training and GPU."""
    parts = [f.name for f in fields(MemoryPlan) if f.name != "reference"]  # precomputed, so there is no second model
    heads = ["model", "trained", "GPU", "GPUs", "sharding", "checkpointing", *parts, "in all"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in CONFIGS:
        for trained in ("full", "LoRA"):
            for gpu in GPUS:
                sharding, gpus, checkpointing, found = fewest(name, trained, gpu)
                numbers = [f"{getattr(found, part) / GIB:.1f}" for part in (*parts, "total")]
                cells = [name, trained, gpu, str(gpus), sharding, "yes" if checkpointing else "no", *numbers]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def large_table() -> str:
    """Qwen2-72B, with checkpointing, on any number of GPUs: GiB for each."""
    heads = ["trained, sharding", *(f"{gpus} GPUs" for gpus in COUNTS[1:])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for trained in ("full", "LoRA"):
        for sharding in ("fsdp", "zero3"):
            if (trained, sharding) == ("LoRA", "zero3"):
                continue  # the same but for the adapters' copies
            plans = [plan("Qwen2-72B", trained, sharding, gpus, checkpointing=True) for gpus in COUNTS[1:]]
            lines.append(f"| {trained}, {sharding} | " + " | ".join(f"{p.total / GIB:.0f}" for p in plans) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), large_table(), sep="\n\n")
