"""`report_to`: what is logged arrives at TensorBoard, Weights & Biases and trackio, by name and value.

TensorBoard's files are read back where it is installed. The other two are replaced by modules that take notes.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stepdpo_kernels.trainer import StepDPOTrainer

OF_TRAINER = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def run(tiny_model, pairs, config, report_to: str, **fields: Any) -> StepDPOTrainer:
    args = config(report_to=report_to, eval_strategy="epoch", **fields)
    trainer = StepDPOTrainer(tiny_model(), args, pairs[:20], eval_dataset=pairs[20:])
    trainer.train()
    return trainer


def expected(trainer: StepDPOTrainer) -> dict[tuple[int, str], float]:
    """Values of the log history by step and by the name that transformers gives them in every tracker."""
    values = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name != "step" and name not in OF_TRAINER:
                of_eval = name.startswith("eval_")
                values[entry["step"], f"eval/{name[5:]}" if of_eval else f"train/{name}"] = value
    names = {name for _, name in values}
    assert {"train/rewards/margins", "train/tokens/saved", "eval/rewards/margins", "eval/loss"} < names
    assert {"train/pairs_per_second", "train/tokens_per_second", "train/logps/chosen"} < names
    return values


def test_tensorboard(tiny_model, pairs, config, monkeypatch, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = run(tiny_model, pairs, config, "tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    read = {(e.step, name): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    values = expected(trainer)
    assert read.keys() >= values.keys()
    for key, value in values.items():
        assert read[key] == pytest.approx(value, rel=1e-6, abs=1e-30), key


@pytest.fixture
def tracker(monkeypatch):
    """tracker(name): a module of that name that keeps what is logged, and the list in which it does."""

    def install(name: str) -> list[dict[str, Any]]:
        logged: list[dict[str, Any]] = []
        module: Any = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.log = logged.append
        module.config = type("Config", (dict,), {"update": lambda self, values, **options: dict.update(self, values)})()
        module.run = SimpleNamespace(_label=lambda **options: None, summary={})
        module.init = module.define_metric = module.finish = lambda *args, **options: None
        module.context_vars = SimpleNamespace(
            current_space_id=SimpleNamespace(get=lambda: None), current_project=SimpleNamespace(get=lambda: None)
        )
        module.__version__ = "0"
        for part in (f"{name}.sdk", f"{name}.sdk.lib", f"{name}.sdk.lib.config_util"):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        sys.modules[f"{name}.sdk.lib.config_util"].ConfigError = ValueError  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return logged

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio(tiny_model, pairs, config, tracker, name):
    logged = tracker(name)
    trainer = run(tiny_model, pairs, config, name)
    read = {(row["train/global_step"], key): value for row in logged for key, value in row.items()}
    values = expected(trainer)
    assert {key: read.get(key) for key in values} == values
    assert sys.modules[name].config["beta"] == 0.4
