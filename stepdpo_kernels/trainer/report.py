"""What a run was and what came of it, from its run file and its logs: `report.md` and `report.png`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerState

from stepdpo_kernels.trainer.run_folder import (
    RUN_FILE,
    missing_parts,
    put_in_place,
    read_run_file,
    settings_now,
    staged,
    versions,
)
from stepdpo_kernels.types import StepDPOError

logger = logging.getLogger("stepdpo_kernels")

REPORT_FILE, PICTURE_FILE = "report.md", "report.png"

Curve = list[tuple[int, float]]  # (optimiser steps done, value)

_SETTINGS = (
    *("loss_type", "beta", "label_smoothing", "rpo_alpha", "simpo_gamma", "reference"),
    *("pairs_per_step", "num_train_epochs", "train_sampling_strategy", "seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("share", "max_tokens_per_batch", "bf16", "fp16", "gradient_checkpointing"),
)
_RESULTS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "accuracy of rewards",
    "rewards/chosen": "reward, chosen",
    "rewards/rejected": "reward, rejected",
    "logps/chosen": "log-prob, chosen, nats",
    "logps/rejected": "log-prob, rejected, nats",
}
# Okabe and Ito's colours: told apart with every common kind of colour vision, and by lightness in print.
_BLUE, _ORANGE, _INK = "#0072B2", "#D55E00", "#444444"


class Sums(NamedTuple):
    """Of all logs of training.

    pairs:     pairs
    tokens:    tokens encoded
    unshared:  tokens that as many unshared branches have
    seconds:   of packing and training, without evaluation and saving
    """

    pairs: float
    tokens: float
    unshared: float
    seconds: float


def sums(history: Iterable[Mapping[str, Any]]) -> Sums | None:
    """From `log_history`; None where no log has the figures."""
    parts = []
    for entry in history:
        tokens, rate = entry.get("tokens/encoded"), entry.get("tokens_per_second")
        if "loss" in entry and tokens and rate:
            seconds = tokens / rate
            parts.append((entry["pairs_per_second"] * seconds, tokens, tokens / (1 - entry["tokens/saved"]), seconds))
    return Sums(*map(sum, zip(*parts, strict=True))) if parts else None


def curves(history: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Everything numeric in `log_history` by its name.

    Metrics of training are those before the step that they are logged at; those of evaluation, after it.
    """
    found: dict[str, Curve] = {}
    for entry in history:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                found.setdefault(name, []).append((entry["step"] - (not name.startswith("eval_")), float(value)))
    return found


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- parts that a model card has as well ----------------------------------------------------------------------------


def settings_table(run: Mapping[str, Any]) -> str:
    """Those that a run began with, and below what changed where it was resumed."""
    config = run["config"]
    rows = [(f"`{name}`", f"{config[name]}") for name in _SETTINGS if config.get(name) is not None]
    if (config.get("max_steps") or 0) > 0:
        rows.append(("`max_steps`", f"{config['max_steps']}"))
    table = markdown_table(("setting", "value"), rows)
    for part in run.get("resumed", []):
        changed = [f"`{name}` {part['config'][name]}" for name in (*_SETTINGS, "max_steps") if name in part["config"]]
        table += f"\n\nFrom {part['from']} on: {', '.join(changed)}." if changed else ""
    return table


def results_table(run: Mapping[str, Any], state: TrainerState) -> str:
    """First and last log of training; of evaluation the first, and the one of the model that was kept."""
    trained = [entry for entry in state.log_history if "loss" in entry]
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
    kept = kept_step(run, state)
    columns = [("training", "", entry) for entry in (trained[:1] + trained[1:][-1:])]
    if evaluated:
        last = next((entry for entry in reversed(evaluated) if entry["step"] == kept), evaluated[-1])
        columns += [("held out", "eval_", entry) for entry in ([] if last is evaluated[0] else evaluated[:1]) + [last]]
    rows = [
        (words, *(_number(entry.get(f"{prefix}{name}")) for _, prefix, entry in columns))
        for name, words in _RESULTS.items()
    ]
    return markdown_table(("", *(f"{what}, step {entry['step']}" for what, _, entry in columns)), rows)


def kept_step(run: Mapping[str, Any], state: TrainerState) -> int:
    """The optimiser step whose model is there at the end."""
    if settings_now(run).get("load_best_model_at_end") and state.best_model_checkpoint and state.best_global_step:
        return state.best_global_step
    return state.global_step


def what_was_trained(run: Mapping[str, Any], state: TrainerState) -> str:
    model = run["model"]
    adapter = f" with a {model['adapter']} adapter" if model["adapter"] else ""
    epochs = f"{state.epoch or 0:.3g}"
    text = (
        f"{state.global_step:,} optimiser step{'s' * (state.global_step != 1)} ({epochs} epoch{'s' * (epochs != '1')}) "
        f"on {run['pairs']:,} step pairs; "
        f"{model['trainable_parameters']:,} of {model['parameters']:,} parameters of a `{model['type']}` model"
        f"{adapter} were trained."
    )
    if state.global_step < state.max_steps:
        text += f" Training stopped before step {state.max_steps:,}, the last one planned."
    kept = kept_step(run, state)
    if kept != state.global_step:
        text += f" The model is that of step {kept:,}, the best by `{settings_now(run)['metric_for_best_model']}`."
    return text


def data_lines(run: Mapping[str, Any], *, paths: bool = True) -> list[str]:
    """paths: False leaves out in which folder the data lay"""
    lines = []
    for name, data in run["data"].items():
        words = {"train": "Training", "eval": "Held out"}[name]
        line = f"- {words}: {data['pairs']:,} pairs, fingerprint `{data['fingerprint'][:16]}`"
        if "load" in data:
            load = data["load"]
            left_out = ", ".join(f"{count} as {reason}" for reason, count in load["left_out"].items())
            source = load["source"] if paths or not Path(load["source"]).exists() else Path(load["source"]).name
            line += f", of `{source}`: {load['records']:,} records, {load['kept']:,} kept"
            line += f", left out {left_out}" if left_out else ""
        lines.append(line + ".")
    return lines


def device_and_versions(run: Mapping[str, Any]) -> str:
    device, then, now = run["device"], run["versions"], versions()
    text = f"{device['processes']} process{'es' if device['processes'] > 1 else ''} on {device['name']}"
    text += "" if device["type"] == "cuda" else f", {device['threads']} thread{'s' * (device['threads'] > 1)}"
    text += ". " + ", ".join(f"{name} {number}" for name, number in then.items()) + "."
    changed = [f"{name} {number}" for name, number in now.items() if then.get(name) != number]
    return text + (f" At the end of the run: {', '.join(changed)}." if changed else "")


def how_to_load(folder: Path, name: str | None = None) -> str | None:
    """Code that loads the model in a folder, under another name if given; None where there is no model."""
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        return None
    library, kind = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    imports = f"from {library} import {kind}"
    lines = [f'model = {kind}.from_pretrained("{name or folder}")']
    if (folder / "tokenizer_config.json").is_file():
        imports += "\nfrom transformers import AutoTokenizer" if adapter else ", AutoTokenizer"
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name or folder}")')
    return "\n".join(["```python", imports, "", *lines, "```"])


# ---- the report -----------------------------------------------------------------------------------------------------


def write_report(output_dir: str | Path, state: TrainerState) -> Path:
    """Writes `report.md` and, with matplotlib, `report.png` into the output folder of a run; each is whole or absent.

    state: the trainer's; its log history goes back to the beginning also where the run was resumed
    Returns the path of `report.md`. Raises StepDPOError where there was no run, or one of an older version.
    """
    folder = Path(output_dir)
    run = read_run_file(folder)
    if not run or not any("loss" in entry for entry in state.log_history):
        raise StepDPOError(f"output_dir {str(folder)!r}: nothing to report, since no training was logged ({RUN_FILE})")
    missing = missing_parts(run)
    if missing:
        raise StepDPOError(
            f"output_dir {str(folder)!r}: nothing to report of a run by an older version: {RUN_FILE} lacks "
            f"{', '.join(missing)}; to resume the run adds them"
        )
    with staged(folder) as stage:
        try:
            draw(stage / PICTURE_FILE, state.log_history)
            picture = f"![Curves of training]({PICTURE_FILE})"
        except ImportError:
            picture = "There is no picture of the curves: matplotlib is not installed."
            logger.warning("%s is not drawn: matplotlib is not installed", PICTURE_FILE)
        (stage / REPORT_FILE).write_text(_text(run, state, folder, picture))
        if (stage / PICTURE_FILE).is_file():
            put_in_place(stage / PICTURE_FILE, folder / PICTURE_FILE)
        else:
            (folder / PICTURE_FILE).unlink(missing_ok=True)  # of another report
        put_in_place(stage / REPORT_FILE, folder / REPORT_FILE)
    return folder / REPORT_FILE


def _text(run: dict[str, Any], state: TrainerState, folder: Path, picture: str) -> str:
    parts = [
        "# Step-DPO: report of a run",
        what_was_trained(run, state),
        picture,
        "## Results",
        results_table(run, state),
        "Means over the pairs since the previous log, before the updates that they led to; those held out, over all "
        "held-out pairs.",
        *_broken(state.log_history),
        "## What sharing saved",
        _sharing(run, state.log_history),
        "## Reference log-probs",
        _reference(run),
        "## Data",
        "\n".join(data_lines(run)),
        "## Settings",
        settings_table(run),
        f"All of them are in `{RUN_FILE}`.",
        "## Device and versions",
        device_and_versions(run),
        "## Loading the model",
        how_to_load(folder) or "No model was saved to this folder before this report was written.",
    ]
    return "\n\n".join(parts) + "\n"


def _broken(history: Iterable[Mapping[str, Any]]) -> list[str]:
    steps = [entry["step"] for entry in history if "loss" in entry and not _is_number(entry["loss"])]
    if not steps:
        return []
    named = ", ".join(map(str, steps[:10])) + (", ..." if len(steps) > 10 else "")
    return [f"**The loss was not finite in {len(steps)} of the logs: step {named}.**"]


def _sharing(run: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> str:
    total = sums(history)
    if total is None:
        return "Not measured."
    rows = [
        ("pairs", f"{total.pairs:,.0f}"),
        ("tokens encoded", f"{total.tokens:,.0f}"),
        ("tokens of the same branches unshared", f"{total.unshared:,.0f}"),
        ("share of tokens saved", f"{1 - total.tokens / total.unshared:.1%}"),
        ("time in optimiser steps", f"{total.seconds:,.1f} s"),
        ("pairs/s", f"{total.pairs / total.seconds:,.3g}"),
        ("encoded tokens/s", f"{total.tokens / total.seconds:,.0f}"),
    ]
    return (
        markdown_table(("", f'`share="{run["config"]["share"]}"`'), rows)
        + "\n\nOver all logs of the run, without evaluation and saving. Unshared branches were counted, not timed."
    )


_OTHER_REFERENCES = {
    "none": "The loss has no reference.",
    "adapter_off": "In every step, from the model without its adapter.",
    "model": "In every step, from a second model.",
}


def _reference(run: Mapping[str, Any]) -> str:
    mode = run["config"]["reference"]
    if mode in _OTHER_REFERENCES:
        return _OTHER_REFERENCES[mode]
    if run["reference_pass"]["seconds"] is None:
        return "Computed by the sharded model before the first step, or read from a cache."
    passed, names = run["reference_pass"], {"train": "training", "eval": "held-out"}
    computed = [f"{names[name]} pairs" for name in passed["computed"]]
    cached = [
        f"{words} pairs" for name, words in names.items() if name in run["data"] and name not in passed["computed"]
    ]
    parts = [f"computed for the {' and '.join(computed)}"] * bool(computed)
    parts += [f"read from a cache for the {' and '.join(cached)}"] * bool(cached)
    return f"{', '.join(parts).capitalize()}, in {passed['seconds']:,.1f} s before training."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else "" if value is None else f"{value}"


# ---- the picture ----------------------------------------------------------------------------------------------------


def draw(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes the picture: loss, margin, accuracy, log-probs, tokens saved and speed over optimiser steps.

    Raises ImportError without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = curves(history)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with rc_context(style):
        figure = Figure(figsize=(12.5, 6.4), layout="constrained")
        loss, margin, accuracy, logps, saved, speed = figure.subplots(2, 3).flat
        _panel(loss, "Loss", found, {"loss": ("training", _BLUE), "eval_loss": ("held out", _ORANGE)})
        for axes, name, title in (
            (margin, "margins", "Reward margin"),
            (accuracy, "accuracies", "Accuracy of rewards"),
        ):
            lines = {f"rewards/{name}": ("training", _BLUE), f"eval_rewards/{name}": ("held out", _ORANGE)}
            _panel(axes, title, found, lines)
        steps = {"chosen": _BLUE, "rejected": _ORANGE}
        lines = {f"logps/{name}": (name, colour) for name, colour in steps.items()}
        lines |= {f"eval_logps/{name}": (f"{name}, held out", colour) for name, colour in steps.items()}
        _panel(logps, "Log-prob of steps, nats", found, lines)
        _panel(saved, "Share of tokens saved by sharing", found, {"tokens/saved": ("training", _BLUE)})
        _panel(speed, "Pairs per second", found, {"pairs_per_second": ("training", _BLUE)})
        saved.set_ylim(0, 1)
        speed.set_ylim(bottom=0)
        figure.savefig(path, dpi=120)


def _panel(axes: Any, title: str, found: Mapping[str, Curve], lines: Mapping[str, tuple[str, str]]) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("optimiser steps")
    there = {name: line for name, line in lines.items() if name in found}
    for name, (words, colour) in there.items():
        marks = {"linestyle": "--", "marker": "o", "markersize": 3} if name.startswith("eval_") else {}
        if len(found[name]) == 1:
            marks = {"marker": "o"}
        axes.plot(*zip(*found[name], strict=True), color=colour, linewidth=1.2, label=words, **marks)
    if len(there) > 1:
        axes.legend(frameon=False)
