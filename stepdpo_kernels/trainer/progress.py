"""The progress bar of training: speed and what sharing saved, beside the time that is left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from stepdpo_kernels._bars import open_bar
from stepdpo_kernels.trainer.meter import Meter

# What the bar shows already; the line of a log in a terminal leaves it out.
_SHOWN = ("pairs_per_second", "tokens_per_second", "tokens/saved")


class StepProgress(ProgressCallback):
    """Trainer's bar with pairs/s, encoded tokens/s and the share of tokens that sharing saved.

    With one process they are averages since training began or was resumed, without evaluation and saving, and are
    brought up to date after every step from numbers that the host has; with several, those of the last log, which are
    sums over all processes. Where stderr is no terminal it gets a line a minute and one at the end.
    """

    training_bar: tqdm[Any] | None
    prediction_bar: tqdm[Any] | None

    def __init__(self, meter: Meter, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = open_bar(state.max_steps, initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        if args.world_size == 1:
            done = self.meter.totals()
            if done.pairs and done.seconds:
                self._show(done.pairs / done.seconds, done.tokens / done.seconds, 1 - done.tokens / done.unshared)
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            if self.prediction_bar is None:
                self.prediction_bar = open_bar(len(eval_dataloader), "evaluation: ", leave=self.training_bar is None)
            self.prediction_bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        if args.world_size > 1 and all(name in logs for name in _SHOWN):
            self._show(*(logs[name] for name in _SHOWN))
        hidden = _SHOWN if sys.stderr.isatty() else ()
        super().on_log(args, state, control, {k: v for k, v in logs.items() if k not in hidden}, **kwargs)

    def _show(self, pairs_per_second: float, tokens_per_second: float, saved: float) -> None:
        text = f"{pairs_per_second:.3g} pairs/s, {tqdm.format_sizeof(tokens_per_second)} tokens/s, {saved:.0%} saved"
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(text, refresh=False)


def use_step_progress(trainer: Trainer, meter: Meter) -> None:
    """Puts the bar in the place of Trainer's own, where it has one (`disable_tqdm`, notebooks)."""
    for callback in [c for c in trainer.callback_handler.callbacks if type(c) is ProgressCallback]:
        trainer.remove_callback(callback)
        trainer.add_callback(StepProgress(meter))
