"""transformers' EarlyStoppingCallback and load_best_model_at_end, through checkpoints that are renamed into place."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, EarlyStoppingCallback
from transformers.trainer_callback import TrainerCallback

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import assert_same_weights, entries, weights


class Scripted(TrainerCallback):
    """Puts values of a test in the place of those that evaluation found, where the best model is looked for."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, values

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics[self.name] = self.values[state.global_step - 1]


@pytest.fixture
def start(tiny_model, pairs, config):
    """start(metric, values, patience, **fields): a run that evaluates and saves after every one of 12 steps."""

    def make(
        metric: str, values: list[float] | None, patience: int = 2, peft_config=None, callbacks=(), **fields
    ) -> StepDPOTrainer:
        settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, num_train_epochs=2)
        settings |= dict(metric_for_best_model=metric, load_best_model_at_end=True, save_total_limit=2)
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        script = [] if values is None else [Scripted(name, values)]
        return StepDPOTrainer(
            tiny_model(),
            config(**settings | fields),
            pairs,
            eval_dataset=pairs[:4],
            peft_config=peft_config,
            callbacks=[*script, EarlyStoppingCallback(patience), *callbacks],
        )

    return make


RISING_THEN_FALLING = [0.1, 0.2, 0.5, 0.4, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]


@pytest.mark.parametrize(
    ("metric", "sign"), [("eval_rewards/margins", 1), ("rewards/accuracies", 1), ("eval_loss", -1), ("loss", -1)]
)
def test_training_stops_and_the_best_model_is_there(start, tmp_path, metric, sign):
    trainer = start(metric, [sign * value for value in RISING_THEN_FALLING])
    assert trainer.args.greater_is_better is (sign == 1)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.state.best_metric == sign * 0.5
    assert trainer.state.best_global_step == 3
    best = tmp_path / "run" / "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(best)
    assert entries(tmp_path / "run") == ["checkpoint-3", "checkpoint-5", "stepdpo_run.json"]
    kept = weights(AutoModelForCausalLM.from_pretrained(best))
    assert_same_weights(kept, weights(trainer.model))
    last = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-5"))
    with pytest.raises(AssertionError):
        assert_same_weights(kept, last)


def test_with_what_evaluation_itself_finds(start):
    """A policy that does not move has no margin that gets better."""
    trainer = start("eval_rewards/margins", None, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == 0.0
    moving = start("eval_rewards/margins", None, patience=12, output_dir=f"{trainer.args.output_dir}-moving")
    moving.train()
    margins = {e["step"]: e["eval_rewards/margins"] for e in moving.state.log_history if "eval_loss" in e}
    assert moving.state.best_global_step == max(margins, key=margins.__getitem__)
    assert moving.evaluate()["eval_rewards/margins"] == pytest.approx(max(margins.values()), rel=1e-5)


def test_an_adapter_is_the_best_one_again(start, tmp_path):
    from peft import LoraConfig
    from safetensors.torch import load_file

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = start("eval_rewards/margins", RISING_THEN_FALLING, peft_config=lora, learning_rate=1e-2)
    trainer.train()
    best = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): tensor for name, tensor in weights(trainer.model).items()}
    assert_same_weights(best, trained)


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_patience_goes_on_where_a_run_is_resumed(start, tmp_path):
    """One evaluation without a better metric before the interruption, one after it."""
    with pytest.raises(KeyboardInterrupt):
        start("eval_rewards/margins", RISING_THEN_FALLING, callbacks=[Stop]).train()
    assert "checkpoint-4" in entries(tmp_path / "run")
    resumed = start("eval_rewards/margins", RISING_THEN_FALLING, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert resumed.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-3")
    assert_same_weights(
        weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")), weights(resumed.model)
    )


def test_only_the_best_is_saved(start, tmp_path):
    trainer = start("eval_rewards/margins", RISING_THEN_FALLING, save_strategy="best", save_total_limit=1)
    trainer.train()
    assert trainer.state.global_step == 5
    assert entries(tmp_path / "run") == ["checkpoint-3", "stepdpo_run.json"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-3")


def test_report_and_card_are_of_the_best(start, tmp_path):
    trainer = start("eval_rewards/margins", RISING_THEN_FALLING)
    trainer.train()
    trainer.save_model()
    for text in (trainer.write_report().read_text(), (tmp_path / "run" / "README.md").read_text()):
        assert "The model is that of step 3, the best by `eval_rewards/margins`." in text
        assert "Training stopped before step 12, the last one planned." in text
        assert "| held out, step 1 | held out, step 3 |" in text


def test_a_relative_output_folder(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = start("eval_rewards/margins", RISING_THEN_FALLING, output_dir="./run/")
    trainer.train()
    assert trainer.state.global_step == 5
    assert (tmp_path / str(trainer.state.best_model_checkpoint)).resolve() == tmp_path / "run" / "checkpoint-3"


def test_the_best_stays_where_a_run_is_resumed_by_another_path(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = [0.1, 0.2, 0.9, *[0.1] * 9]
    with pytest.raises(KeyboardInterrupt):
        start("eval_rewards/margins", values, patience=12, callbacks=[Stop], output_dir="run").train()
    resumed = start("eval_rewards/margins", values, patience=12, max_steps=7)
    resumed.train(resume_from_checkpoint=True)
    assert entries(tmp_path / "run") == ["checkpoint-3", "checkpoint-7", "stepdpo_run.json"]
    best = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(best, weights(resumed.model))


def test_the_report_of_a_run_whose_best_is_gone(start, tmp_path):
    """transformers forgets a best checkpoint that is no longer where it was."""
    values = [0.1, 0.2, 0.9, *[0.1] * 9]
    with pytest.raises(KeyboardInterrupt):
        start("eval_rewards/margins", values, patience=12, callbacks=[Stop]).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = start("eval_rewards/margins", values, patience=12, max_steps=6, output_dir=str(tmp_path / "moved"))
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint is None
    assert "the best by" not in moved.write_report().read_text()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_stops_early(tiny_model, tiny_tokenizer, step_records, tmp_path):
    from stepdpo_kernels.cli import main
    from stepdpo_kernels.cli.train import parse
    from tests.trainer.training import write_jsonl

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", step_records(6, 4))
    options = {"model": tmp_path / "model", "data": data, "eval_data": data, "output_dir": tmp_path / "out"}
    options |= {"reference_cache_dir": tmp_path / "cache", "pairs_per_step": 4, "learning_rate": 0.0}
    options |= {"early_stopping_patience": 2, "disable_tqdm": True}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with pytest.raises(StepDPOError, match="early_stopping_patience needs eval_strategy and metric_for_best_model"):
        parse(arguments)
    arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", "eval_rewards/margins"]
    assert parse(arguments)[1].restore_callback_states_from_checkpoint
    with pytest.raises(SystemExit) as exit_:
        main(["train", *arguments])
    assert exit_.value.code in (0, None)
    assert "3 optimiser steps" in (tmp_path / "out" / "report.md").read_text()
