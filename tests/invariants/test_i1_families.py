"""I1 and I3 for every family that is supported: packed gradients are the unpacked model's, and the same bits twice.

Every family has all it is known for (windows, softcaps, sinks, experts, latent attention, ...: tests/families.py). By
default with whole trees; `make slow` adds trees of single pairs. bfloat16: test_i1_bfloat16.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import TreePlan
from tests.exactness import (
    assert_exact,
    errors,
    family_model,
    packed_step,
    plain_step,
    references_near,
)
from tests.families import FAMILIES, LONG
from tests.forests import forest_pairs

Make = Callable[..., PreTrainedModel]
TRAINING = ("full", "checkpointing", "lora", "lora and checkpointing")
every_family = pytest.mark.parametrize("kind", FAMILIES)
WHOLE = {"partial_rotary_factor": 1.0}


def _levels(plan: TreePlan) -> int:
    """The largest number of leaves that own a part of one path."""
    owner = torch.bucketize(torch.arange(plan.num_tokens), plan.cu_q[1:].long(), right=True)
    paths = plan.keys.index.split(plan.cu_k.diff().tolist())
    return max(owner[path].unique().numel() for path in paths)


@every_family
@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("share", ["tree", pytest.param("pair", marks=pytest.mark.slow)])
def test_gradients_of_a_family(tiny_model: Make, kind: str, training: str, share: str) -> None:
    if kind == "deepseek_v3" and "lora" in training and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("this PEFT wraps experts in a way that this transformers does not know")
    pairs = forest_pairs()
    model = family_model(tiny_model, kind, training)
    refs = references_near(model, pairs)
    (batch,) = pack_pairs(pairs, 10_000, share=share)
    assert batch.plan.num_leaves >= 7
    assert share == "pair" or _levels(batch.plan) >= 3
    ours = packed_step(model, [batch], refs, num_pairs=len(pairs))
    plain = plain_step(family_model(tiny_model, kind, training), pairs, refs)
    assert_exact(ours, plain)
    # what the comparison compares is not nothing
    assert all(g.norm() > 1e-6 for g in plain.gradients.values())
    assert ("lora" in training) == all("lora_" in name for name in plain.gradients)


@every_family
def test_the_same_bits_twice(tiny_model: Make, kind: str) -> None:
    pairs = forest_pairs()
    refs = -40 + torch.arange(2.0 * len(pairs))
    batches = pack_pairs(pairs, 150)
    torch.set_num_threads(2)  # conftest puts it back
    steps = [
        packed_step(family_model(tiny_model, kind, dtype=dtype), batches, refs, num_pairs=len(pairs))
        for dtype in (torch.float32, torch.bfloat16)
        for _ in range(2)
    ]
    for first, second in (steps[:2], steps[2:]):
        assert first.loss == second.loss
        for name in first.gradients:
            assert torch.equal(first.gradients[name], second.gradients[name]), name


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": 3.0}),
        ("gemma2", {"final_logit_softcapping": 8.0}),
        ("granite", {"logits_scaling": 2.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
        (
            "phi3",
            {"rope_parameters": LONG | dict.fromkeys(("short_factor", "long_factor"), [1.0] * 8) | WHOLE, **WHOLE},
        ),
        ("phi3", {"rope_parameters": LONG | {"short_factor": LONG["long_factor"]}}),
        ("olmo", {"clip_qkv": None}),
        *((kind, {"sliding_window": 8}) for kind, family in FAMILIES.items() if "sliding_window" in family.config),
    ],
    ids=str,
)
def test_what_a_family_is_known_for_matters(tiny_model: Make, kind: str, change: dict[str, Any]) -> None:
    # or the tests above would say nothing about it
    pairs = forest_pairs()
    model = family_model(tiny_model, kind)
    refs = references_near(model, pairs)
    plain = plain_step(model, pairs, refs)
    other = plain_step(family_model(tiny_model, kind, **change), pairs, refs)
    assert max(errors(other, plain).values()) > 1e-3


def test_sinks_matter(tiny_model: Make) -> None:
    pairs = forest_pairs()
    model = family_model(tiny_model, "gpt_oss")
    refs = references_near(model, pairs)
    plain = plain_step(model, pairs, refs)
    sinks = [name for name in plain.gradients if name.endswith("sinks")]
    assert len(sinks) == model.config.num_hidden_layers
    assert all(plain.gradients[name].norm() > 1e-3 for name in sinks)
