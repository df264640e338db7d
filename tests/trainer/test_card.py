"""The model card, whose it is, and the ways to the hub that write one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.card import card_text
from stepdpo_kernels.trainer.run_folder import read_run_file
from tests.trainer.training import entries


@pytest.fixture
def trained(tiny_model, tiny_tokenizer, pairs, config):
    def train(**fields) -> StepDPOTrainer:
        options = {"model": tiny_model(), "eval_dataset": pairs[20:], "peft_config": None}
        options |= {name: fields.pop(name) for name in options if name in fields}
        settings = {"max_steps": 1, **fields}
        trainer = StepDPOTrainer(
            args=config(**settings), train_dataset=pairs[:20], processing_class=tiny_tokenizer(), **options
        )
        trainer.train()
        return trainer

    return train


def test_what_a_card_says(trained, tmp_path):
    trainer = trained(eval_strategy="epoch", max_steps=-1, beta=0.3)
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["step-dpo", "dpo", "stepdpo-kernels"]
    assert data["model_name"] == "run"
    assert not {"base_model", "datasets", "license"} & data.keys()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for text in (
        "arXiv:2406.18629",
        "5 optimiser steps (1 epoch) on 20 step pairs",
        "| `beta` | 0.3 |",
        f"| {evaluated[-1]['eval_rewards/margins']:.4g} |",
        f"transformers {transformers.__version__}",
        "of `pairs.jsonl`: 24 records",
        'AutoModelForCausalLM.from_pretrained("run")',
    ):
        assert text in card.text, text
    assert str(tmp_path) not in card.content


def test_hub_ids_become_metadata_and_folders_do_not(trained, pairs, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "secret" / "base")
    trainer = trained(model=AutoModelForCausalLM.from_pretrained(tmp_path / "secret" / "base"))
    run = read_run_file(tmp_path / "run")
    text = card_text(tmp_path / "run", run, trainer.state)
    assert "`base`, trained with Step-DPO" in text
    assert "secret" not in text
    run["model"]["name"] = "Qwen/Qwen2-7B-Instruct"
    run["data"]["train"]["load"]["source"] = "xinlai/Math-Step-DPO-10K"
    data = ModelCard(card_text(tmp_path / "run", run, trainer.state, license="apache-2.0")).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen2-7B-Instruct"
    assert data["datasets"] == ["xinlai/Math-Step-DPO-10K"]
    assert data["license"] == "apache-2.0"


def test_a_card_of_somebody_else_stays_and_the_log_says_so(trained, tmp_path, caplog):
    trainer = trained()
    path = tmp_path / "run" / "README.md"
    path.write_text("# My own words\n")
    trainer.save_model()
    assert path.read_text() == "# My own words\n"
    assert "it stays, and no model card is written" in caplog.text
    path.unlink()
    trainer.save_model()
    ours = path.read_text()
    trainer.create_model_card(license="mit")
    assert ModelCard.load(path).data.license == "mit"
    path.write_text(ours.replace("Step-DPO", "step-dpo"))
    trainer.save_model()
    assert path.read_text() == ours.replace("Step-DPO", "step-dpo")


def test_an_adapter_gets_our_card_and_not_a_form_to_fill_in(trained, tmp_path):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trained(peft_config=lora, save_strategy="steps", save_steps=1)
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "More Information Needed" not in card.text
    assert "README.md" not in entries(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "README.md").write_text("# My own words\n")
    trainer.save_model()
    assert (tmp_path / "run" / "README.md").read_text() == "# My own words\n"
    assert isinstance(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_config(trainer.model.config), tmp_path / "run"), PeftModel
    )


def test_another_folder_gets_a_card_of_its_own(trained, tmp_path):
    trainer = trained()
    trainer.save_model(str(tmp_path / "kept"))
    assert 'from_pretrained("kept")' in (tmp_path / "kept" / "README.md").read_text()
    assert "README.md" not in entries(tmp_path / "run")


def test_without_a_run_there_is_no_card(tiny_model, pairs, config, tmp_path):
    trainer = StepDPOTrainer(tiny_model(), config(), pairs)
    trainer.save_model()
    assert "README.md" not in entries(tmp_path / "run")
    trainer.create_model_card(model_name="untrained")  # Trainer's
    assert "untrained" in (tmp_path / "run" / "README.md").read_text()


# ---- to the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """What is uploaded, each as (message, files with their texts), instead of the network."""
    uploads: list[tuple[str, dict[str, str]]] = []

    def upload_folder(*, folder_path, commit_message, **options):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        texts = {str(path.relative_to(folder_path)): path.read_text(errors="replace") for path in files}
        uploads.append((commit_message, texts))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True)

    def create_repo(name, **options):
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    fake = SimpleNamespace(upload_folder=upload_folder, create_repo=create_repo)
    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    else:
        monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder)
        monkeypatch.setattr("transformers.trainer.create_repo", create_repo)
    return uploads


def test_push_to_hub_takes_our_card(trained, hub, tmp_path):
    trainer = trained(hub_model_id="me/mine")
    trainer.model.add_model_tags(["extra"])
    trainer.push_to_hub(license="mit", dataset_tags="xinlai/Math-Step-DPO-10K")
    ((message, files),) = hub
    assert message == "End of training"
    assert {"README.md", "model.safetensors", "config.json", "stepdpo_run.json"} <= files.keys()
    data = ModelCard(files["README.md"]).data.to_dict()
    assert data["license"] == "mit"
    assert data["datasets"] == ["xinlai/Math-Step-DPO-10K"]
    assert data["model_name"] == "mine"
    assert data["tags"] == ["step-dpo", "dpo", "stepdpo-kernels", "extra"]
    assert 'from_pretrained("me/mine")' in files["README.md"]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_checkpoints_are_pushed_from_where_they_stay(trained, hub, tmp_path, strategy):
    trainer = trained(
        push_to_hub=True,
        hub_model_id="me/mine",
        hub_strategy=strategy,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
    )
    during = list(hub)
    trainer.save_model()
    assert hub[-1][0] == "Model save"
    assert hub[-1][1]["README.md"] == (tmp_path / "run" / "README.md").read_text()
    messages = [message for message, _ in during]
    expected = [f"Training in progress, step {step}" for step in (1, 2)]
    if strategy == "checkpoint":
        expected = [text for message in expected for text in (message, f"{message}, checkpoint")]
    assert messages == ([] if strategy == "end" else expected)
    for message, files in during:
        assert not any(name.startswith(".incomplete") for name in files)
        assert "model.safetensors" in files
        assert ("optimizer.pt" in files) == message.endswith("checkpoint")
