"""The report of a run: figures from its logs, also after a resume, and nothing half written."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainerState

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.report import curves, results_table, sums
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import entries


def rows(text: str) -> dict[str, list[str]]:
    """Cells of all tables by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n\n")[2].partition("\n\n## ")[0]


@pytest.fixture
def trained(tiny_model, tiny_tokenizer, pairs, config):
    def train(resume: bool | None = None, **fields) -> StepDPOTrainer:
        args = config(eval_strategy="epoch", num_train_epochs=2, train_sampling_strategy="sequential", seed=7, **fields)
        trainer = StepDPOTrainer(tiny_model(), args, pairs[:20], tiny_tokenizer(), eval_dataset=pairs[20:])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.fixture
def blank(monkeypatch):
    """Pictures are empty files, which are there at once."""
    monkeypatch.setattr("stepdpo_kernels.trainer.report.draw", lambda path, history: path.touch())


def test_what_a_report_says(trained, pairs, tmp_path):
    trainer = trained()
    trainer.save_model()
    assert trainer.write_report() == tmp_path / "run" / "report.md"
    text = (tmp_path / "run" / "report.md").read_text()
    every = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"10 optimiser steps (2 epochs) on 20 step pairs; {every:,} of {every:,} parameters" in text
    table = rows(text)
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    held_out = [entry for entry in history if "eval_loss" in entry]
    expected = [logged[0]["loss"], logged[-1]["loss"], held_out[0]["eval_loss"], held_out[-1]["eval_loss"]]
    assert table["loss"] == [f"{value:.4g}" for value in expected]
    assert table["loss"][0] == f"{math.log(2):.4g}"
    assert "| training, step 1 | training, step 10 | held out, step 5 | held out, step 10 |" in text

    tokens = 2 * sum(b.num_tokens for i in range(0, 20, 4) for b in pack_pairs(pairs[i : i + 4], 250))
    unshared = 2 * sum(2 * p.prefix_ids.size + p.chosen_ids.size + p.rejected_ids.size for p in pairs[:20])
    assert (table["pairs"], table["tokens encoded"]) == (["40"], [f"{tokens:,}"])
    assert table["tokens of the same branches unshared"] == [f"{unshared:,}"]
    assert table["share of tokens saved"] == [f"{1 - tokens / unshared:.1%}"]
    seconds = sum(4 / entry["pairs_per_second"] for entry in logged)
    assert table["pairs/s"] == [f"{40 / seconds:,.3g}"]
    assert "Computed for the training pairs and held-out pairs, in" in text
    assert (table["`beta`"], table["`seed`"]) == (["0.4"], ["7"])
    assert "simpo_gamma" not in text
    assert f"Training: 20 pairs, fingerprint `{pairs[:20].fingerprint[:16]}`" in text
    assert f"`{tmp_path / 'pairs.jsonl'}`: 24 records, 24 kept." in text
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "![Curves of training](report.png)" in text
    code = section(text, "Loading the model").strip().removeprefix("```python").removesuffix("```")
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]) is type(trainer.model)
    assert names["tokenizer"].get_vocab() == trainer.processing_class.get_vocab()
    assert ".incomplete" not in entries(tmp_path / "run")


def test_after_a_resume_the_report_is_of_the_whole_run(trained, blank, monkeypatch):
    from transformers.trainer_callback import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    fields = dict(save_strategy="steps", save_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*_default_callbacks(), Stop])
        with pytest.raises(KeyboardInterrupt):
            trained(**fields)
    resumed = trained(resume=True, **fields)
    text = resumed.write_report().read_text()
    table = rows(text)
    assert table["pairs"] == ["40"]
    assert table["loss"][0] == f"{math.log(2):.4g}"
    assert "| training, step 1 | training, step 10 |" in text
    assert "Computed for the training pairs and held-out pairs" in text  # by the first of the two
    assert len(curves(resumed.state.log_history)["loss"]) == 10
    assert "No model was saved to this folder" in text
    assert "From checkpoint" not in text  # with the same settings


def _default_callbacks():
    from transformers.trainer import DEFAULT_CALLBACKS

    return DEFAULT_CALLBACKS


def test_without_matplotlib_there_is_still_a_report(trained, monkeypatch, tmp_path, caplog):
    trainer = trained()
    (tmp_path / "run" / "report.png").write_text("an older one")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = trainer.write_report().read_text()
    assert "matplotlib is not installed" in text
    assert "report.png)" not in text
    assert "matplotlib is not installed" in caplog.text
    assert entries(tmp_path / "run") == ["report.md", "stepdpo_run.json"]


def test_a_report_is_whole_or_absent(trained, blank, monkeypatch, tmp_path):
    trainer = trained()
    before = entries(tmp_path / "run")

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.write_report()
    assert entries(tmp_path / "run") == before
    trainer.write_report()
    assert entries(tmp_path / "run") == sorted([*before, "report.md", "report.png"])


def test_there_is_no_report_without_a_run(tiny_model, pairs, config, tmp_path):
    trainer = StepDPOTrainer(tiny_model(), config(), pairs)
    with pytest.raises(StepDPOError, match="nothing to report"):
        trainer.write_report()
    assert entries(tmp_path / "run") == []


def test_settings_that_a_resumed_run_changes(trained, blank, tmp_path):
    fields = dict(save_strategy="steps", save_steps=2)
    trained(max_steps=2, **fields)
    trained(max_steps=4, learning_rate=0.5, resume=True, **fields)
    resumed = trained(max_steps=6, learning_rate=0.5, adam_beta1=0.8, resume=True, **fields)
    text = section(resumed.write_report().read_text(), "Settings")
    assert rows(text)["`learning_rate`"] == ["0.001"]
    assert "From checkpoint-2 on: `learning_rate` 0.5, `max_steps` 4.\n\nFrom checkpoint-4 on: `max_steps` 6." in text
    run = json.loads((tmp_path / "run" / "stepdpo_run.json").read_text())
    assert [part["config"] for part in run["resumed"]] == [
        {"max_steps": 4, "learning_rate": 0.5},
        {"max_steps": 6, "adam_beta1": 0.8},
    ]


def test_a_run_by_an_older_version(trained, blank, tmp_path, caplog):
    """What its run file lacks is said, and added where the run goes on."""
    fields = dict(save_strategy="steps", save_steps=4)
    trainer = trained(**fields)
    file = tmp_path / "run" / "stepdpo_run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({name: run[name] for name in ("config", "reference", "pairs")}))
    with pytest.raises(StepDPOError, match=r"lacks model, data, device, versions, reference_pass; to resume"):
        trainer.write_report()
    trainer.save_model()
    assert "stepdpo_run.json is of an older version and lacks model, data" in caplog.text
    assert "README.md" not in entries(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    resumed = trained(resume=True, **fields)
    assert json.loads(file.read_text()).keys() == run.keys()
    assert f"fingerprint `{run['data']['train']['fingerprint'][:16]}`" in resumed.write_report().read_text()


def test_only_the_main_process_writes(trained, monkeypatch, tmp_path):
    trainer = trained()
    before = entries(tmp_path / "run")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.write_report()
    trainer.create_model_card()
    assert entries(tmp_path / "run") == before


def test_an_adapter_and_a_loss_without_reference(tiny_model, blank, pairs, config, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = StepDPOTrainer(model, config(reference="none", max_steps=1), pairs, peft_config=lora)
    trainer.train()
    trainer.save_model()
    text = trainer.write_report().read_text()
    assert "with a LORA adapter" in text
    assert "The loss has no reference." in text
    names: dict[str, Any] = {}
    exec(section(text, "Loading the model").strip().removeprefix("```python").removesuffix("```"), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    assert "tokenizer" not in names


def test_figures_of_a_history_by_hand():
    history = [
        {"step": 2, "loss": 0.7, "pairs_per_second": 2.0, "tokens_per_second": 100.0, "tokens/encoded": 400.0}
        | {"tokens/saved": 0.5},
        {"step": 2, "eval_loss": 0.6, "eval_tokens/encoded": 9.0, "eval_tokens_per_second": 1.0},
        {"step": 4, "loss": None, "pairs_per_second": 4.0, "tokens_per_second": 300.0, "tokens/encoded": 600.0}
        | {"tokens/saved": 0.25},
        {"step": 6, "loss": math.nan},
        {"step": 6, "train_loss": 0.1},
    ]
    assert sums(history) == (8 + 8, 1000.0, 800 + 800, 6.0)
    assert sums(history[1:2]) is None
    found = curves(history)
    assert found["eval_loss"] == [(2, 0.6)]
    assert found["loss"][0] == (1, 0.7)
    assert "step" not in found
    state = TrainerState(log_history=history, global_step=6, max_steps=6)
    assert rows(results_table({"config": {}}, state))["loss"] == ["0.7", "nan", "0.6"]


def test_what_was_not_measured_is_not_claimed(trained, blank, tmp_path):
    """A history of other software, a loss that broke, a run that stopped early."""
    trainer = trained()
    for entry in trainer.state.log_history:
        entry.pop("tokens/encoded", None)
        if entry["step"] == 3 and "loss" in entry:
            entry["loss"] = math.nan
    trainer.state.max_steps = 12
    text = trainer.write_report().read_text()
    assert section(text, "What sharing saved") == "Not measured."
    assert "**The loss was not finite in 1 of the logs: step 3.**" in text
    assert "Training stopped before step 12" in text


def test_the_command_reports(tiny_model, blank, tiny_tokenizer, step_records, tmp_path, capsys):
    from stepdpo_kernels.cli import main
    from tests.trainer.training import write_jsonl

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    records = step_records(3, 4)
    records[1]["rejected"] = records[1]["chosen"]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    options = {"model": tmp_path / "model", "data": data, "output_dir": tmp_path / "out", "max_steps": 1}
    options |= {"reference_cache_dir": tmp_path / "cache", "pairs_per_step": 4, "disable_tqdm": True}
    with pytest.raises(SystemExit) as exit_:
        main(["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))])
    assert exit_.value.code in (0, None)
    assert {"report.md", "report.png", "README.md", "stepdpo_run.json"} < set(entries(tmp_path / "out"))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "12 records, 11 kept, left out 1 as identical_branches." in text
    assert f"what came of it is in {tmp_path / 'out' / 'report.md'}" in re.sub("\n", "", capsys.readouterr().out)
    run = json.loads((tmp_path / "out" / "stepdpo_run.json").read_text())
    assert run["data"]["train"]["load"]["left_out"] == {"identical_branches": 1}
