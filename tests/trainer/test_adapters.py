"""Adapters of peft: reproducible, trained alone, and refused where the loss would leave their part out."""

from __future__ import annotations

import pytest
import torch

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.exactness import assert_exact, packed_step, plain_step, references_near
from tests.trainer.training import assert_same_weights, entries, losses, weights


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def test_a_run_with_an_adapter_depends_on_its_seed_alone(tiny_model, pairs, config, tmp_path):
    runs = []
    for number in range(3):
        torch.manual_seed(number)  # whatever happened before
        args = config(output_dir=str(tmp_path / f"run{number}"), seed=7 if number == 2 else 42, learning_rate=1e-2)
        trainer = StepDPOTrainer(tiny_model(), args, pairs, peft_config=lora())
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_same_weights(runs[0][1], runs[1][1])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_moves(tiny_model, pairs, config, options, checkpointing):
    args = config(learning_rate=1e-2, gradient_checkpointing=checkpointing)
    trainer = StepDPOTrainer(tiny_model(), args, pairs, peft_config=lora(**options))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert losses(trainer)[-1] < 0.68


def test_checkpointing_changes_no_gradient_of_an_adapter(tiny_model, pairs, config, tmp_path):
    runs = []
    for checkpointing in (False, True):
        args = config(
            output_dir=str(tmp_path / f"run{checkpointing}"), learning_rate=1e-2, gradient_checkpointing=checkpointing
        )
        trainer = StepDPOTrainer(tiny_model(), args, pairs, peft_config=lora())
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_of_the_head_is_refused(tiny_model, pairs, config, tmp_path, options):
    with pytest.raises(StepDPOError, match="take lm_head out of the adapter's target_modules"):
        StepDPOTrainer(tiny_model(), config(), pairs, peft_config=lora(**options))
    assert entries(tmp_path) == ["pairs.jsonl"]


def test_an_adapter_of_all_linear_layers_leaves_the_head_alone(tiny_model, pairs, config):
    trainer = StepDPOTrainer(
        tiny_model(), config(learning_rate=1e-2), pairs, peft_config=lora(target_modules="all-linear")
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.68


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),  # the head stays as it is, in peft's forward, too
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"trainable_token_indices": [5, 6]}, False),  # of the head as well
    ],
    ids=str,
)
def test_tied_embeddings_are_exact_or_refused(tiny_model, pairs, options, packed):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model(tie_word_embeddings=True), lora(init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    some = list(pairs)[:6]
    ref_logps = references_near(model, some)
    if packed:
        ours = packed_step(model, pack_pairs(some, 250), ref_logps, num_pairs=6)
        assert_exact(ours, plain_step(model, some, ref_logps))
    else:
        with pytest.raises(StepDPOError, match="take lm_head out of the adapter's target_modules"):
            packed_step(model, pack_pairs(some, 250), ref_logps, num_pairs=6)


def test_virtual_tokens_are_refused(tiny_model, pairs, config, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    tuning = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(StepDPOError, match="PROMPT_TUNING puts virtual tokens before every text"):
        StepDPOTrainer(tiny_model(), config(), pairs, peft_config=tuning)
    with pytest.raises(StepDPOError, match="virtual tokens"):
        StepDPOTrainer(get_peft_model(tiny_model(), tuning), config(), pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]


def test_an_adapter_inside_a_plain_model_is_refused(tiny_model, pairs, config, tmp_path):
    """transformers loads an adapter's folder so, and would then save nothing but the adapter."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(StepDPOError, match=r"load it with peft\.PeftModel\.from_pretrained"):
        StepDPOTrainer(loaded, config(), pairs)
    with pytest.raises(StepDPOError, match=r"load it with peft\.PeftModel\.from_pretrained"):
        StepDPOTrainer(str(tmp_path / "adapter"), config(), pairs)
    assert entries(tmp_path) == ["adapter", "base", "pairs.jsonl"]


def test_a_trained_adapter_goes_on_from_where_it_was(tiny_model, pairs, config, tmp_path):
    from peft import PeftModel

    first = StepDPOTrainer(tiny_model(), config(learning_rate=1e-2, save_strategy="epoch"), pairs, peft_config=lora())
    first.train()
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "checkpoint-6", is_trainable=True)
    second = StepDPOTrainer(model, config(output_dir=str(tmp_path / "second"), learning_rate=0.0), pairs)
    second.train()
    # The reference is still the model without any adapter, so the margin that was learned is there from the start.
    assert losses(second)[0] < 0.67
