"""I1, I3, I4, I5, I6 and I10 by StepDPOTrainer alone; I2, I7, I8 and I9 have files of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stepdpo_kernels.ops.linear_logprob import chunked
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.allocations import Allocations
from tests.exactness import Step, assert_exact, plain_step
from tests.families import FAMILIES
from tests.model.test_support import REFUSED, small_model
from tests.numerics import assert_as_good_as_eager
from tests.trainer.test_adapters import lora
from tests.trainer.training import assert_same_weights, entries, losses, make_config, make_pairs, watch, weights


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pairs(step_records, tiny_tokenizer, tmp_path):
    """12 pairs of three problems."""
    return make_pairs(step_records(3, 4), tiny_tokenizer(), tmp_path)


class Recording(StepDPOTrainer):
    """Keeps the gradients of the first optimiser step, before they are clipped, and what the head's layer is given."""

    gradients: dict[str, torch.Tensor]

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.state.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return super()._clip_grad_norm(model)


def one_step(model, pairs, tmp_path, adapter=None, ref_model=None, **fields) -> Recording:
    """All pairs in one optimiser step of several forward passes, away from the reference."""
    config = make_config(tmp_path, pairs_per_step=len(pairs), learning_rate=0.0, **fields)
    trainer = Recording(model, config, pairs, ref_model=ref_model, peft_config=adapter)
    trainer.train()
    return trainer


CASES = [
    ("llama", {}),
    ("qwen2", {"gradient_checkpointing": True}),
    ("gemma2", {"adapter": True}),
    ("gpt_oss", {"adapter": True, "gradient_checkpointing": True}),
    ("llama", {"share": "pair", "reference": "model"}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_i1_a_step_is_that_of_the_plain_model(tiny_model, pairs, tmp_path, kind, fields):
    """Every gradient to 1e-5 of the unpacked model's, also with an adapter, sliding windows and checkpointing."""
    fields = dict(fields)
    adapter = lora(init_lora_weights=False) if fields.pop("adapter", False) else None
    shape = {"vocab_size": 600, **FAMILIES[kind].config}
    trainer = one_step(tiny_model(kind, **shape), pairs, tmp_path, adapter, tiny_model(kind, seed=5, **shape), **fields)
    table = trainer.train_dataset.ref_logps
    if table is None:  # of a reference that is asked in every step
        other = one_step(
            tiny_model(kind, **shape), pairs, tmp_path / "other", adapter, tiny_model(kind, seed=5, **shape)
        )
        table = other.train_dataset.ref_logps
    model = trainer.model
    model.zero_grad()
    model.train(False)
    plain = plain_step(model, list(pairs), table.T.reshape(-1))
    assert abs(plain.loss - 0.6931) > 1e-2  # there is something to get wrong
    assert_exact(Step(losses(trainer)[0], trainer.gradients), plain)


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_i3_a_run_gives_the_same_bits_again(tiny_model, pairs, tmp_path, fields):
    runs = []
    for name in ("one", "other"):
        config = make_config(tmp_path, output_dir=str(tmp_path / name), num_train_epochs=2, **fields)
        trainer = Recording(tiny_model(), config, pairs)
        trainer.train()
        runs.append((trainer.gradients, weights(trainer.model), losses(trainer)))
    assert_same_weights(runs[0][0], runs[1][0])
    assert_same_weights(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


def test_i4_a_step_never_holds_all_logits(tiny_model, pairs, tmp_path, monkeypatch):
    """200,000 words; no allocation is beyond a chunk or the head's own gradient."""
    monkeypatch.setenv("STEPDPO_IMPL", "linear_logprob=chunked")  # whose allocations torch sees
    vocabulary, some = 200_000, pairs[:8]
    model = tiny_model(vocab_size=vocabulary, hidden_size=16)
    config = make_config(tmp_path, pairs_per_step=8, max_tokens_per_batch=8192, max_steps=1)
    trainer = StepDPOTrainer(model, config, some)
    trainer.prepare_references()
    with Allocations() as seen:
        trainer.train()
    rows = sum(p.chosen_ids.size + p.rejected_ids.size for p in some)
    logits, head = 4 * rows * vocabulary, 4 * vocabulary * 16
    assert max(chunked.CHUNK_BYTES, head) < logits / 4  # or this would allow what it is to forbid
    assert seen.largest <= max(chunked.CHUNK_BYTES, head)


def test_i5_bfloat16_is_as_good_as_the_plain_model(tiny_model, pairs, tmp_path):
    """Gradients of the adapter's weights, against float64; `eager` is the unpacked model under the same autocast."""

    def adapted() -> Any:
        return tiny_model(vocab_size=600, seed=1)

    torch.manual_seed(0)
    trainer = one_step(adapted(), pairs, tmp_path, ref_model=tiny_model(vocab_size=600), bf16=True)
    ref_logps = trainer.train_dataset.ref_logps.T.reshape(-1)
    exact = plain_step(adapted().double(), list(pairs), ref_logps.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = plain_step(adapted(), list(pairs), ref_logps)
    for name, oracle in exact.gradients.items():
        ours, plain = trainer.gradients[name], eager.gradients[name]
        assert_as_good_as_eager(name, ours, plain, oracle, torch.bfloat16)


def test_i6_a_frozen_head_costs_no_product_and_no_memory(tiny_model, pairs, tmp_path, monkeypatch):
    """With an adapter, beside a run whose head is trained: one product of the head less, no gradient of its size."""
    monkeypatch.setenv("STEPDPO_IMPL", "linear_logprob=reference")  # three products trained, two frozen
    vocabulary, size = 30_000, 64
    found = {}
    for frozen in (False, True):
        adapter = lora()
        model = tiny_model(vocab_size=vocabulary, hidden_size=size)
        config = make_config(tmp_path / str(frozen), pairs_per_step=4, max_tokens_per_batch=8192, max_steps=1)
        trainer = StepDPOTrainer(model, config, pairs[:4], peft_config=adapter)
        head = trainer.model.get_base_model().lm_head.weight
        head.requires_grad_(not frozen)
        trainer.prepare_references()
        seen = watch(trainer)
        with FlopCounterMode(display=False) as flops, Allocations() as memory:
            trainer.train()
        found[frozen] = (flops.get_flop_counts()["Global"], memory.peak, head.grad is None)
    (step,) = seen
    product = 2 * step.batch.targets.numel() * size * vocabulary
    assert sum(found[False][0].values()) - sum(found[True][0].values()) == product
    assert found[False][1] - found[True][1] > 0.9 * 4 * vocabulary * size


SILENTLY_WRONG = {
    **{kind: ("small", options, message) for kind, (options, message) in REFUSED.items()},
    "chunked": ("llama", {"attention_chunk_size": 16}, "its attention is chunked"),
    "dropout": ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1; set it to 0.0"),
}


@pytest.mark.parametrize("name", SILENTLY_WRONG)
def test_i10_a_model_that_would_be_silently_wrong(tiny_model, pairs, tmp_path, name):
    kind, options, message = SILENTLY_WRONG[name]
    model = small_model(name, **options) if kind == "small" else tiny_model(kind, **options)
    with pytest.raises(StepDPOError, match=f"cannot be packed: .*{message}"):
        StepDPOTrainer(model, make_config(tmp_path), pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]
