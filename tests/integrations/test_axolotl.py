"""Axolotl itself on the CPU, with the plugin and without: `make axolotl` has it, in an environment of its own."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from stepdpo_kernels import StepDPOError, load_step_pairs
from stepdpo_kernels.integrations import versions

pytest.importorskip("axolotl")

from stepdpo_kernels.integrations import axolotl as adapter

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "axolotl" / "step_dpo.yml"
SAID = "trains on packed prefix forests"
STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "reference model, a trainer of one's own": {
        "gradient_checkpointing": False,
        "trainer_cls": "axolotl.core.trainers.dpo.trainer.AxolotlDPOTrainer",
    },
    "precomputed reference, checkpointing": {"precompute_ref_log_probs": True},
    "adapter, hinge": {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "dpo_loss_type": ["hinge"],
    },
}
# `axolotl train` in one process. Axolotl draws the weights of a new adapter before it sets the seed.
TRAIN = """
import sys
from transformers import set_seed
set_seed(0)
from axolotl.cli.train import do_cli
do_cli(sys.argv[1])
"""
# The trainer as Axolotl builds it: its class, what it trains on, and the sizes of one packed batch.
BUILD = """
import json, sys
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import setup_model_and_trainer
cfg = load_cfg(sys.argv[1])
trainer, *_ = setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))
rows = [dict(row) for row in trainer.train_dataset]
batch = trainer.data_collator(rows)
found = {"class": type(trainer).__name__, "rows": rows, "padded": batch["input_ids"].numel(),
         "packed": batch["stepdpo_forest"].batch.num_tokens}
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model, tiny_tokenizer, step_records) -> Path:
    """A folder with a model, its tokenizer, step pairs and the same as pairs of whole answers."""
    folder = tmp_path_factory.mktemp("axolotl")
    tiny_model("qwen2").save_pretrained(folder / "model")
    tiny_tokenizer("qwen2").save_pretrained(folder / "model")
    records = step_records(problems=3, pairs=8)
    answers = [
        {"prompt": f"{r['prompt']}\n{r['initial_reason_steps']}", "chosen": r["chosen"], "rejected": r["rejected"]}
        for r in records
    ]
    for name, rows in (("pairs", records), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configuration(workplace: Path, folder: Path, data: str, **changes: Any) -> Path:
    """The example's YAML with other paths, a size for the CPU, and changes."""
    settings = yaml.safe_load(EXAMPLE.read_text()) | {
        "base_model": str(workplace / "model"),
        "datasets": [{"path": str(workplace / f"{data}.jsonl"), "split": "train"}],
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "bf16": False,
        "seed": 3,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def run_python(*arguments: str | Path) -> str:
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def train(config: Path) -> tuple[list[dict[str, float]], str]:
    """What was logged at each step, and what was printed."""
    printed = run_python("-c", TRAIN, config)
    (state,) = config.parent.glob(f"out/checkpoint-{STEPS}/trainer_state.json")
    return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry], printed


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_axolotl_without_the_plugin(workplace, tmp_path, variant):
    changes = VARIANTS[variant]
    plain, printed = train(configuration(workplace, tmp_path / "plain", "answers", plugins=None, **changes))
    assert SAID not in printed
    packed, printed = train(configuration(workplace, tmp_path / "packed", "answers", **changes))
    assert SAID in printed
    assert len(plain) == len(packed) == STEPS
    assert len({entry["loss"] for entry in plain}) == STEPS
    for before, after in zip(plain, packed, strict=True):
        assert before.keys() == after.keys()
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["rewards/margins"] == pytest.approx(before["rewards/margins"], abs=1e-4)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-3)
        assert after["entropy"] == pytest.approx(before["entropy"], rel=1e-4)


def test_the_example_trains_on_step_pairs(workplace, tmp_path):
    logs, printed = train(configuration(workplace, tmp_path / "run", "pairs"))
    assert SAID in printed
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[0]["rewards/margins"] == 0
    assert logs[-1]["loss"] != logs[0]["loss"]


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_step_pairs_are_tokenised_as_by_load_step_pairs(workplace, tmp_path, template):
    """In particular, nothing ends a step."""
    config = configuration(workplace, tmp_path / "run", "pairs", stepdpo_template=template)
    run_python("-c", BUILD, config, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["class"] == "AxolotlStepDPOTrainer"
    tokenizer = AutoTokenizer.from_pretrained(workplace / "model")
    expected = load_step_pairs(workplace / "pairs.jsonl", tokenizer, template=template)
    ids = {(*p.prefix_ids.tolist(), -1, *p.chosen_ids.tolist(), -1, *p.rejected_ids.tolist()) for p in expected}
    assert len(ids) == 24
    assert {(*r["prompt_ids"], -1, *r["chosen_ids"], -1, *r["rejected_ids"]) for r in found["rows"]} == ids
    assert found["packed"] < found["padded"] / 4


def test_training_that_is_not_dpo_is_refused():
    with pytest.raises(StepDPOError, match="rl: kto is not DPO"):
        adapter.StepDPOPlugin().register({"rl": "kto", "plugins": [adapter.NAME]})


def test_a_trainer_class_of_the_users_own_is_kept():
    cfg = {"rl": "dpo", "plugins": [adapter.NAME], "trainer_cls": "mine.Trainer"}
    adapter.StepDPOPlugin().register(cfg)
    assert cfg["trainer_cls"] == "mine.Trainer"


def test_a_run_that_does_not_name_the_plugin_is_left_alone():
    cfg = {"rl": "kto", "plugins": ["another.Plugin"]}
    adapter.StepDPOPlugin().register(cfg)
    assert cfg == {"rl": "kto", "plugins": ["another.Plugin"]}


@pytest.mark.parametrize("found", ["0.18.0", "0.20.0"])
def test_another_axolotl_is_refused_when_the_plugin_is_imported(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda package: found)
    with pytest.raises(StepDPOError, match=rf"axolotl {found} is not supported.*axolotl>=0\.19,<0\.20"):
        importlib.reload(adapter)
