"""QLoRA: an adapter on 4-bit weights of bitsandbytes, which the packed forward leaves as they are."""

from __future__ import annotations

import pytest
import torch

from stepdpo_kernels.trainer import StepDPOTrainer, load_model
from stepdpo_kernels.types import StepDPOError
from tests.exactness import Step, assert_exact, plain_step
from tests.trainer.test_adapters import lora
from tests.trainer.training import entries, losses

pytest.importorskip("bitsandbytes")


@pytest.fixture
def four_bits(tiny_model, tmp_path):
    """four_bits(): a new model of 4-bit weights; all layers can be divided into blocks of 64."""
    tiny_model(intermediate_size=128).save_pretrained(tmp_path / "model")

    def load():
        model = load_model(str(tmp_path / "model"), load_in_4bit=True)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert model.lm_head.weight.dtype == torch.float32
        return model

    return load


@pytest.mark.parametrize("reference", ["precomputed", "adapter_off"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_from_log_2(four_bits, pairs, config, tmp_path, reference, checkpointing):
    args = config(reference=reference, gradient_checkpointing=checkpointing, learning_rate=1e-2)
    trainer = StepDPOTrainer(four_bits(), args, pairs, peft_config=lora(target_modules="all-linear"))
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses(trainer)[-1] < 0.68
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert name not in frozen or torch.equal(p, frozen[name])
    trainer.save_model()
    assert "adapter_model.safetensors" in entries(tmp_path / "run")


def test_gradients_are_those_of_every_branch_on_its_own(four_bits, pairs, config):
    """After an evaluation, which on the CPU would have bitsandbytes repack what it multiplies with."""
    args = config(learning_rate=0.0, pairs_per_step=len(pairs), max_grad_norm=0.0, max_steps=1)
    found: dict[str, torch.Tensor] = {}

    class Gradients(StepDPOTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
            return super()._get_grad_norm(model, grad_norm)

    trainer = Gradients(four_bits(), args, pairs, peft_config=lora(init_lora_weights=False), eval_dataset=pairs)
    trainer.evaluate()
    trainer.train()
    ref_logps = trainer.train_dataset.ref_logps.T.reshape(-1)
    trainer.model.zero_grad()
    plain = plain_step(trainer.model, list(pairs), ref_logps)
    assert_exact(Step(losses(trainer)[0], found), plain)


def test_a_quantised_head_is_refused(tiny_model, pairs, config, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(intermediate_size=128).save_pretrained(tmp_path / "model")
    everything = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=everything)
    assert model.lm_head.weight.dtype == torch.uint8
    with pytest.raises(StepDPOError, match=r"head is quantised to torch\.uint8.*llm_int8_skip_modules"):
        StepDPOTrainer(model, config(), pairs, peft_config=lora())
