"""The progress bar: its figures, and where it keeps quiet."""

from __future__ import annotations

import io
import re
import time
from typing import ClassVar

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.progress import StepProgress
from tests.trainer.training import make_config


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def bars(trainer: StepDPOTrainer) -> list[type]:
    return [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]


def test_the_bar_takes_the_place_of_trainers(tiny_model, pairs, config):
    assert bars(StepDPOTrainer(tiny_model(), config(disable_tqdm=False), pairs)) == [StepProgress]
    quiet = StepDPOTrainer(tiny_model(), config(disable_tqdm=True), pairs)
    assert bars(quiet) == []
    assert any(type(c) is PrinterCallback for c in quiet.callback_handler.callbacks)

    class MyProgress(ProgressCallback):
        pass

    trainer = StepDPOTrainer(tiny_model(), config(disable_tqdm=False), pairs, callbacks=[MyProgress])
    assert bars(trainer) == [MyProgress, StepProgress]
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(ProgressCallback)
    assert bars(trainer) == []


def test_what_a_terminal_shows(tiny_model, pairs, config, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    args = config(disable_tqdm=False, logging_steps=2, eval_strategy="epoch", train_sampling_strategy="sequential")
    trainer = StepDPOTrainer(tiny_model(), args, pairs, eval_dataset=pairs[:4])
    trainer.train()
    shown = terminal.getvalue().split("\r")
    assert any("evaluation: 100%" in line for line in shown)
    last = [line for line in shown if "6/6 steps" in line][-1]
    assert last.startswith("100%|")
    found = re.search(r"<00:00, ([\d.e+]+) pairs/s, ([\d.]+)([kM]?) tokens/s, (\d+)% saved\]", last)
    assert found is not None, last
    tokens = sum(batch.num_tokens for i in range(0, 24, 4) for batch in pack_pairs(pairs[i : i + 4], 250))
    unshared = sum(2 * p.prefix_ids.size + p.chosen_ids.size + p.rejected_ids.size for p in pairs)
    assert float(found[4]) == pytest.approx(100 * (1 - tokens / unshared), abs=0.5)
    rate = float(found[2]) * {"": 1, "k": 1e3, "M": 1e6}[found[3]]
    assert rate / float(found[1]) == pytest.approx(tokens / len(pairs), rel=0.05)
    assert trainer._meter.totals().tokens == tokens
    logged = [line for line in capsys.readouterr().out.splitlines() if "'rewards/margins'" in line]
    assert len(logged) == 3
    assert all("pairs_per_second" not in line and "tokens/batch" in line for line in logged)


def test_a_step_shows_when_it_ends(tiny_model, pairs, config):
    """Also where it is not known yet whether its numbers are finite."""

    class Shown(TrainerCallback):
        pairs: ClassVar[list[int]] = []

        def on_step_end(self, *given, **options):
            self.pairs.append(trainer._meter.totals().pairs)

    trainer = StepDPOTrainer(tiny_model(), config(logging_steps=4), pairs, callbacks=[Shown])
    trainer.train()
    assert Shown.pairs == [4, 8, 12, 16, 20, 24]


def test_lines_where_there_is_no_terminal(tiny_model, pairs, config, capsys, monkeypatch, tmp_path):
    trainer = StepDPOTrainer(tiny_model(), config(disable_tqdm=False), pairs, eval_dataset=pairs[:4])
    trainer.train()
    captured = capsys.readouterr()
    assert "\r" not in captured.err
    lines = [line for line in captured.err.splitlines() if " steps (" in line]
    assert [line.partition(" steps")[0] for line in lines] == ["0/6", "6/6"]
    assert re.fullmatch(
        r"6/6 steps \(100%\), 00:\d\d passed, 00:00 left, \S+ pairs/s, \S+ tokens/s, \d+% saved", lines[1]
    )
    assert captured.out.count("pairs_per_second") == 6
    trainer.evaluate()
    assert " steps (" not in capsys.readouterr().err

    monkeypatch.setattr("stepdpo_kernels._bars.LINE_SECONDS", 0)
    StepDPOTrainer(tiny_model(), config(disable_tqdm=False, output_dir=str(tmp_path / "again")), pairs).train()
    lines = [line for line in capsys.readouterr().err.splitlines() if " steps (" in line]
    assert len(lines) == 7


def test_a_resumed_run_goes_on_where_it_was(tiny_model, pairs, config, capsys):
    args = dict(disable_tqdm=False, save_strategy="steps", save_steps=4)
    StepDPOTrainer(tiny_model(), config(**args), pairs).train()
    capsys.readouterr()
    trainer = StepDPOTrainer(tiny_model(), config(**args), pairs)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
    lines = [line for line in capsys.readouterr().err.splitlines() if " steps (" in line]
    assert [line.partition(" steps")[0] for line in lines] == ["4/6", "6/6"]
    assert trainer._meter.totals().pairs == 8


def test_several_processes_show_the_sums_of_the_last_log(capsys, tmp_path):
    """What the callback is given by Trainer there."""
    from types import SimpleNamespace

    from stepdpo_kernels.trainer.meter import Meter

    args, state = SimpleNamespace(world_size=2), SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)
    bar = StepProgress(Meter())
    bar.on_train_begin(args, state, None)
    logs = {"loss": 0.5, "pairs_per_second": 12.0, "tokens_per_second": 3400.0, "tokens/saved": 0.25}
    bar.on_log(args, state, None, logs=logs)
    state.global_step = 4
    bar.on_step_end(args, state, None)
    bar.on_train_end(args, state, None)
    assert "12 pairs/s, 3.40k tokens/s, 25% saved" in capsys.readouterr().err

    other = StepProgress(Meter())
    state.is_world_process_zero = False
    for event in (other.on_train_begin, other.on_step_end, other.on_train_end):
        event(args, state, None)
    other.on_log(args, state, None, logs=logs)
    assert capsys.readouterr() == ("", "")


class Slow(TrainerCallback):
    """Evaluation and saving that take a while."""

    def on_prediction_step(self, args, state, control, **kwargs):
        time.sleep(0.15)

    def on_save(self, args, state, control, **kwargs):
        time.sleep(0.15)


def test_speed_is_that_of_training_alone(tiny_model, pairs, tmp_path):
    """Also where evaluation falls between two logs."""
    args = make_config(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, logging_steps=6
    )
    trainer = StepDPOTrainer(tiny_model(), args, pairs, eval_dataset=pairs[:4], callbacks=[Slow])
    began = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - began
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = 24 / logged["pairs_per_second"]
    assert seconds < wall - 10 * 0.15
    assert trainer._meter.totals()[:1] == (24,)
    assert trainer._meter.totals().seconds == pytest.approx(seconds, rel=1e-3)
