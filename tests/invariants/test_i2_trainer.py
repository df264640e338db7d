"""I2 in the trainer: as long as the policy has not moved every margin is exactly 0.0, so the loss is log 2."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch

from stepdpo_kernels.trainer import StepDPOTrainer
from tests.trainer.training import Seen, losses, make_config, make_pairs, watch

LOG_2 = math.log(2)
ULP = 2.0**-24  # of float32 just below 1


def check_start(seen: list[Seen], logged: list[float], num_pairs: int) -> None:
    """All forward passes of an epoch, in which the learning rate was 0."""
    assert sorted(i for batch, _, _ in seen for i in batch.pair_index.tolist()) == list(range(num_pairs))
    for _, output, _ in seen:
        assert (output.chosen_logps < -1).all()  # there is something to subtract
        assert (output.rejected_logps < -1).all()
        for zero in (output.chosen_rewards, output.rejected_rewards, output.margins):
            assert torch.equal(zero, torch.zeros_like(zero))
    assert all(abs(loss - LOG_2) <= ULP for loss in logged), logged


@pytest.fixture
def pairs(step_records, tiny_tokenizer, tmp_path):
    return make_pairs(step_records(6, 4), tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize("share", ["tree", "pair", "none"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_i2_margins_are_zero_until_the_policy_moves(tiny_model, pairs, tmp_path, kind, bf16, share):
    config = make_config(tmp_path, learning_rate=0.0, bf16=bf16, share=share)
    trainer = StepDPOTrainer(tiny_model(kind), config, pairs)
    seen = watch(trainer)
    trainer.train()
    assert len(seen) > len(losses(trainer)) == 6  # several forward passes a step
    check_start(seen, losses(trainer), len(pairs))


@pytest.mark.parametrize("bf16", [False, True])
def test_i2_on_several_threads(tiny_model, pairs, tmp_path, bf16):
    torch.set_num_threads(2)
    config = make_config(tmp_path, learning_rate=0.0, bf16=bf16, max_tokens_per_batch=8192, pairs_per_step=12)
    trainer = StepDPOTrainer(tiny_model(), config, pairs)
    seen = watch(trainer)
    trainer.train()
    check_start(seen, losses(trainer), len(pairs))


def test_i2_with_weights_in_bfloat16(tiny_model, pairs, tmp_path, caplog):
    config = make_config(tmp_path, learning_rate=0.0)
    with caplog.at_level(logging.WARNING, "stepdpo_kernels"):
        trainer = StepDPOTrainer(tiny_model(dtype=torch.bfloat16), config, pairs)
    assert "21 of the trained parameters are torch.bfloat16, where updates smaller than" in caplog.text
    seen = watch(trainer)
    trainer.train()
    check_start(seen, losses(trainer), len(pairs))


@pytest.mark.parametrize("bf16", [False, True])
def test_i2_with_the_reference_from_the_cache(tiny_model, pairs, tmp_path, monkeypatch, bf16):
    for run in ("first", "second"):
        config = make_config(tmp_path, output_dir=str(tmp_path / run), learning_rate=0.0, bf16=bf16)
        trainer = StepDPOTrainer(tiny_model(), config, pairs)
        seen = watch(trainer)
        trainer.train()
        check_start(seen, losses(trainer), len(pairs))
        # The second run has the cache and nothing else.
        monkeypatch.setattr("stepdpo_kernels.trainer.ref_logps.compute_ref_logps", None)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_i2_with_gradient_checkpointing(tiny_model, pairs, tmp_path, options):
    config = make_config(
        tmp_path, learning_rate=0.0, gradient_checkpointing=True, gradient_checkpointing_kwargs=options or None
    )
    trainer = StepDPOTrainer(tiny_model(), config, pairs)
    seen = watch(trainer)
    trainer.train()
    check_start(seen, losses(trainer), len(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [{}, {"reference": "model"}, {"gradient_checkpointing": True}], ids=str)
def test_i2_with_compiled_layers(tiny_model, pairs, tmp_path, bf16, options):
    """Checkpointing has layers compiled with and without gradients, into programs that may round differently."""
    config = make_config(tmp_path, learning_rate=0.0, bf16=bf16, torch_compile=True, **options)
    trainer = StepDPOTrainer(tiny_model(), config, pairs)
    seen = watch(trainer)
    trainer.train()
    if options.get("gradient_checkpointing"):
        assert losses(trainer) == pytest.approx([LOG_2] * 6, abs=0.01 if bf16 else 1e-5)
    else:
        check_start(seen, losses(trainer), len(pairs))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_i2_with_lora(tiny_model, pairs, tmp_path, bf16, checkpointing):
    from peft import LoraConfig

    config = make_config(tmp_path, learning_rate=0.0, bf16=bf16, gradient_checkpointing=checkpointing)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = StepDPOTrainer(tiny_model(), config, pairs, peft_config=lora)
    seen = watch(trainer)
    trainer.train()
    check_start(seen, losses(trainer), len(pairs))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reference", ["adapter_off", "model"])
def test_i2_with_the_reference_asked_in_every_step(tiny_model, pairs, tmp_path, bf16, checkpointing, reference):
    """Then in every epoch, whatever forests it draws."""
    from peft import LoraConfig

    config = make_config(
        tmp_path,
        reference=reference,
        learning_rate=0.0,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        num_train_epochs=2,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if reference == "adapter_off" else None
    trainer = StepDPOTrainer(tiny_model(), config, pairs, peft_config=lora, eval_dataset=pairs[:5])
    seen = watch(trainer)
    trainer.train()
    half = next(i for i in range(len(seen)) if sum(batch.num_pairs for batch, _, _ in seen[:i]) == len(pairs))
    for epoch, logged in ((seen[:half], losses(trainer)[:6]), (seen[half:], losses(trainer)[6:])):
        check_start(epoch, logged, len(pairs))
    seen.clear()
    check_start(seen, [trainer.evaluate()["eval_loss"]], 5)


def test_i2_with_a_reference_model_of_its_own(tiny_model, pairs, tmp_path):
    config = make_config(tmp_path, learning_rate=0.0, bf16=True)
    trainer = StepDPOTrainer(tiny_model(), config, pairs, ref_model=tiny_model())
    seen = watch(trainer)
    trainer.train()
    check_start(seen, losses(trainer), len(pairs))


@pytest.mark.parametrize("bf16", [False, True])
def test_i2_in_evaluation_before_training(tiny_model, step_records, tiny_tokenizer, pairs, tmp_path, bf16):
    held_out = make_pairs(step_records(2, 3, seed=9), tiny_tokenizer(), tmp_path)
    config = make_config(tmp_path, learning_rate=0.0, bf16=bf16, per_device_eval_batch_size=4)
    trainer = StepDPOTrainer(tiny_model(), config, pairs, eval_dataset=held_out)
    seen = watch(trainer)
    metrics = trainer.evaluate()
    check_start(seen, [metrics["eval_loss"]], len(held_out))
    assert metrics["eval_rewards/margins"] == 0.0
    seen.clear()
    trainer.train()
    check_start(seen, losses(trainer), len(pairs))
    seen.clear()
    check_start(seen, [trainer.evaluate()["eval_loss"]], len(held_out))


@pytest.mark.parametrize("before", [False, True])
def test_i2_after_another_trainer_used_the_model_in_another_precision(tiny_model, pairs, tmp_path, before):
    model = tiny_model()
    for run, bf16 in (("first", before), ("second", not before)):
        config = make_config(tmp_path, output_dir=str(tmp_path / run), learning_rate=0.0, bf16=bf16)
        trainer = StepDPOTrainer(model, config, pairs)
        seen = watch(trainer)
        trainer.train()
        check_start(seen, losses(trainer), len(pairs))


def test_i2_bf16_computes_in_bfloat16_whoever_prepared_the_model(tiny_model, pairs, tmp_path):
    """accelerate prepares a model once: a model that something else prepared must not fall back to float32."""
    from accelerate import Accelerator

    logps = {}
    for name in ("fresh", "prepared", "float32"):
        model = tiny_model()
        if name == "prepared":
            model = Accelerator(cpu=True).prepare_model(model)
        config = make_config(tmp_path, output_dir=str(tmp_path / name), learning_rate=0.0, bf16=name != "float32")
        trainer = StepDPOTrainer(model, config, pairs)
        seen = watch(trainer)
        trainer.train()
        check_start(seen, losses(trainer), len(pairs))
        logps[name] = torch.cat([output.chosen_logps for _, output, _ in seen])
    assert torch.equal(logps["fresh"], logps["prepared"])
    assert not torch.equal(logps["fresh"], logps["float32"])


def test_i2_holds_for_the_first_epoch_and_nearly_after(tiny_model, pairs, tmp_path):
    """Later epochs draw pairs into other forests, whose sums round differently."""
    config = make_config(tmp_path, learning_rate=0.0, num_train_epochs=2)
    trainer = StepDPOTrainer(tiny_model(), config, pairs)
    seen = watch(trainer)
    trainer.train()
    half = next(i for i in range(len(seen)) if sum(batch.num_pairs for batch, _, _ in seen[:i]) == len(pairs))
    check_start(seen[:half], losses(trainer)[:6], len(pairs))
    second = torch.cat([output.margins for _, output, _ in seen[half:]])
    assert second.numel() == len(pairs)
    assert second.abs().max() < 1e-4


def test_i2_a_moved_policy_has_margins(tiny_model, pairs, tmp_path):
    """The checks above can fail."""
    moved = tiny_model()
    reference = copy.deepcopy(moved)
    with torch.no_grad():
        moved.lm_head.weight[3] += 2**-10
    config = make_config(tmp_path, learning_rate=0.0)
    trainer = StepDPOTrainer(moved, config, pairs, ref_model=reference)
    seen = watch(trainer)
    trainer.train()
    with pytest.raises(AssertionError):
        check_start(seen, losses(trainer), len(pairs))


def test_i2_pairs_left_out_of_the_first_epoch_have_a_reference_too(tiny_model, pairs, tmp_path: Path):
    config = make_config(tmp_path, learning_rate=0.0, pairs_per_step=7, dataloader_drop_last=True, num_train_epochs=4)
    trainer = StepDPOTrainer(tiny_model(), config, pairs)
    seen = watch(trainer)
    trainer.train()
    drawn = {i for batch, _, _ in seen for i in batch.pair_index.tolist()}
    assert drawn == set(range(len(pairs)))
    assert all(output.margins.abs().max() < 1e-4 for _, output, _ in seen)
