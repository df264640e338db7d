"""What a run leaves on disk: plain transformers and peft folders, without a trace of how they were trained."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.run_folder import count_parameters
from tests.trainer.training import assert_same_weights, entries, weights


@pytest.fixture
def prompt(pairs) -> torch.Tensor:  # (2, 60)
    return torch.from_numpy(pairs[1].prefix_ids[None, :60].repeat(2, 0)).long()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_loads_a_checkpoint(
    tiny_model, tiny_tokenizer, pairs, config, prompt, tmp_path, kind, bf16, tied
):
    tokenizer = tiny_tokenizer(kind)
    model = tiny_model(kind, tie_word_embeddings=tied)
    start = weights(model)
    args = config(save_strategy="steps", save_steps=3, bf16=bf16)
    trainer = StepDPOTrainer(model, args, pairs, tokenizer)
    trainer.train()
    trainer.save_model()
    assert not torch.equal(start["model.norm.weight"], model.model.norm.weight)
    for folder in (tmp_path / "run" / "checkpoint-6", tmp_path / "run"):
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.config._attn_implementation == "sdpa"
        assert type(loaded) is type(model)
        assert_same_weights(weights(loaded), weights(model))
        with torch.no_grad():
            expected = loaded(prompt).logits
            assert torch.equal(model.eval()(prompt).logits.float(), expected) or bf16
            torch.testing.assert_close(model(prompt).logits.float(), expected, rtol=0, atol=0.3)
        text = AutoTokenizer.from_pretrained(folder)
        assert text.get_vocab() == tokenizer.get_vocab()
        assert text.chat_template == tokenizer.chat_template


def test_nothing_in_a_checkpoint_tells_how_it_was_trained(tiny_model, tiny_tokenizer, pairs, config, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    trainer = StepDPOTrainer(model, config(save_strategy="epoch"), pairs, tiny_tokenizer())
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-6"
    for file in folder.glob("*.json"):
        assert "stepdpo_tree" not in file.read_text(), file
    before, after = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "before", folder))
    assert before | {"use_cache": False} == after  # Trainer switches it off
    # A model loaded from there trains on.
    again = AutoModelForCausalLM.from_pretrained(folder)
    StepDPOTrainer(again, config(output_dir=str(tmp_path / "again"), max_steps=1), pairs).train()


def test_a_trained_model_still_generates_and_computes_ordinary_losses(tiny_model, pairs, config, prompt):
    model = tiny_model()
    StepDPOTrainer(model, config(), pairs).train()
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    model.eval()
    with torch.no_grad():
        mask = torch.ones_like(prompt)
        mask[0, :7] = 0  # padding on the left
        for options in ({}, {"labels": prompt}, {"attention_mask": mask}):
            ours, theirs = model(prompt, **options), plain(prompt, **options)
            torch.testing.assert_close(ours.logits[1], theirs.logits[1], rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.logits[0, 7:], theirs.logits[0, 7:], rtol=0, atol=1e-5)
            assert (ours.loss is None) == (theirs.loss is None)
        generate = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(prompt, **generate), plain.generate(prompt, **generate))


@pytest.mark.parametrize("bf16", [False, True])
def test_peft_loads_the_checkpoint_of_an_adapter(tiny_model, tiny_tokenizer, pairs, config, prompt, tmp_path, bf16):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    args = config(save_strategy="epoch", bf16=bf16, learning_rate=1e-2)
    trainer = StepDPOTrainer(tiny_model(), args, pairs, tiny_tokenizer(), peft_config=lora)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-6"
    assert "adapter_model.safetensors" in entries(folder)
    assert "model.safetensors" not in entries(folder)
    plain = tiny_model()
    loaded = PeftModel.from_pretrained(tiny_model(), folder)
    assert all("lora_" in name for name in weights(trainer.model))
    trained = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    assert_same_weights(trained, weights(trainer.model))
    with torch.no_grad():
        after = loaded(prompt).logits
        assert (after - plain(prompt).logits).abs().max() > 0.01
        torch.testing.assert_close(
            trainer.model.eval()(prompt).logits.float(), after, rtol=0, atol=0.3 if bf16 else 1e-5
        )
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(prompt).logits, after, rtol=0, atol=1e-4)


def test_old_checkpoints_go_and_the_best_stays(tiny_model, pairs, config, tmp_path):
    args = config(
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=False,  # the first evaluation, of an unmoved policy, is the best then
        learning_rate=1e-2,
    )
    trainer = StepDPOTrainer(tiny_model(), args, pairs, eval_dataset=pairs[:4])
    trainer.train()
    margins = {e["step"]: e["eval_rewards/margins"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(margins, key=margins.__getitem__)
    assert entries(tmp_path / "run") == sorted({f"checkpoint-{best}", "checkpoint-12", "stepdpo_run.json"})
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    state = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    assert_same_weights(
        weights(AutoModelForCausalLM.from_pretrained(state["best_model_checkpoint"])), weights(trainer.model)
    )


def test_the_run_file_says_what_made_the_run(tiny_model, pairs, config, tmp_path):
    import platform

    import accelerate
    import peft
    import transformers

    import stepdpo_kernels

    args = config(beta=0.3, max_steps=1, max_grad_norm=float("inf"))
    trainer = StepDPOTrainer(tiny_model(), args, pairs[:20], eval_dataset=list(pairs[20:]))
    trainer.train()
    run = json.loads((tmp_path / "run" / "stepdpo_run.json").read_text(), parse_constant=pytest.fail)
    assert run["config"]["max_grad_norm"] == "inf"
    assert run["config"]["report_to"] == []
    assert run["config"]["beta"] == 0.3
    assert run["config"]["pairs_per_step"] == 4
    assert run["pairs"] == 20
    assert run["data"]["train"] == {
        "pairs": 20,
        "fingerprint": pairs[:20].fingerprint,
        "load": {
            "source": str(tmp_path / "pairs.jsonl"),
            "files": list(pairs.report.files),
            "records": 24,
            "kept": 24,
            "left_out": {},
        },
    }
    assert run["data"]["eval"] == {"pairs": 4, "fingerprint": pairs[20:].fingerprint}
    for package in (stepdpo_kernels, transformers, accelerate, peft, torch):
        assert run["versions"][package.__name__] == package.__version__
    assert run["versions"]["python"] == platform.python_version()
    assert run["device"] | {"name": ""} == {"type": "cpu", "name": "", "processes": 1, "threads": 1}
    assert run["device"]["name"]
    every = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert (run["model"]["trainable_parameters"], run["model"]["parameters"]) == (every, every)
    assert run["model"]["type"] == tiny_model().config.model_type
    assert run["reference_pass"]["computed"] == ["train", "eval"]
    assert run["reference_pass"]["seconds"] > 0
    assert {"model", "pairs", "settings"} <= run["reference"]["train"].keys()


def test_the_run_file_counts_what_an_adapter_trains(tiny_model, pairs, config, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = StepDPOTrainer(tiny_model(), config(max_steps=1), pairs, peft_config=lora)
    trainer.train()
    run = json.loads((tmp_path / "run" / "stepdpo_run.json").read_text())["model"]
    assert run["adapter"] == "LORA"
    assert (run["trainable_parameters"], run["parameters"]) == trainer.model.get_nb_trainable_parameters()
    assert 0 < run["trainable_parameters"] < run["parameters"]


def test_packed_and_sharded_parameters_are_counted_in_full():
    """As bitsandbytes packs two weights to a byte, and as DeepSpeed leaves an empty tensor behind."""

    class Params4bit(torch.nn.Parameter):
        pass

    model = torch.nn.Linear(3, 2)
    model.packed = Params4bit(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_numel = 6  # type: ignore[attr-defined]
    assert count_parameters(model) == (6 + 2, 6 + 2 + 20)


def test_a_cached_reference_is_not_called_computed(tiny_model, pairs, config, tmp_path):
    for name, computed in (("first", ["train"]), ("second", [])):
        StepDPOTrainer(tiny_model(), config(output_dir=str(tmp_path / name), max_steps=1), pairs).train()
        run = json.loads((tmp_path / name / "stepdpo_run.json").read_text())
        assert run["reference_pass"]["computed"] == computed


@pytest.mark.parametrize("max_steps", [2, 6, -1])
def test_a_run_that_is_over_is_not_trained_further(tiny_model, pairs, config, max_steps):
    fields = dict(max_steps=max_steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    trainer = StepDPOTrainer(tiny_model(), config(**fields), pairs)
    trainer.train()
    over = StepDPOTrainer(tiny_model(), config(**fields), pairs)
    over.train(resume_from_checkpoint=True)
    assert over.state.global_step == trainer.state.global_step
    assert_same_weights(weights(over.model), weights(trainer.model))


def test_logs_are_json_for_every_reader(tiny_model, pairs, config, monkeypatch, tmp_path):
    """NaN and Infinity are Python's own; -0.0 is a sign without a meaning."""
    trainer = StepDPOTrainer(tiny_model(), config(max_steps=2, save_strategy="steps", save_steps=2), pairs)
    add = trainer._meter.drain

    def drain(accelerator, **options):
        logged = add(accelerator, **options)
        step = trainer.state.global_step
        return logged | {"logps/chosen": -0.0 if step == 1 else math.nan, "rewards/margins": -math.inf}

    monkeypatch.setattr(trainer._meter, "drain", drain)
    trainer.train()
    assert [str(e["logps/chosen"]) for e in trainer.state.log_history if "loss" in e] == ["0.0", "nan"]
    state = (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text()
    logged = json.loads(state, parse_constant=pytest.fail)["log_history"]
    assert [(entry["logps/chosen"], entry["rewards/margins"]) for entry in logged] == [(0.0, None), (None, None)]
    again = StepDPOTrainer(tiny_model(), config(max_steps=3), pairs)
    again.train(resume_from_checkpoint=True)
    assert len([entry for entry in again.state.log_history if "loss" in entry]) == 3
