"""The model card: README.md of a trained model's folder."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import Trainer, TrainerState

from stepdpo_kernels.trainer.report import (
    data_lines,
    device_and_versions,
    how_to_load,
    results_table,
    settings_table,
    what_was_trained,
)
from stepdpo_kernels.trainer.run_folder import RUN_FILE, missing_parts, put_in_place, read_run_file, staged

logger = logging.getLogger("stepdpo_kernels")

CARD_FILE = "README.md"
TAGS = ("step-dpo", "dpo", "stepdpo-kernels")

_CITATION = """```bibtex
@article{lai2024stepdpo,
  title   = {Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs},
  author  = {Xin Lai and Zhuotao Tian and Yukang Chen and Senqiao Yang and Xiangru Peng and Jiaya Jia},
  journal = {arXiv preprint arXiv:2406.18629},
  year    = {2024}
}
```"""
_SIGNATURE = re.compile(r"<!-- stepdpo_kernels: (\w{16}), and what is edited is kept -->\n")


def write_card(folder: Path, run: Mapping[str, Any], state: TrainerState, **given: Any) -> bool:
    """Writes `README.md` of a model's folder, whole or not at all, unless there is one of somebody else's.

    run: what the run file holds; given: as in `card_text`
    Returns whether it was written. One that this function did not write, or that was edited since, stays, and the log
    says so.
    """
    path = folder / CARD_FILE
    if path.is_file() and not _is_ours(path.read_text(errors="replace")):
        logger.warning("%s is not of this package or was edited: it stays, and no model card is written", path)
        return False
    text = card_text(folder, run, state, **given)
    signature = f"<!-- stepdpo_kernels: {_digest(text)}, and what is edited is kept -->\n"
    with staged(folder) as stage:
        (stage / CARD_FILE).write_text(text + signature)
        put_in_place(stage / CARD_FILE, path)
    return True


# Of Trainer.create_model_card, in its order, and what they are called in `card_text`; None where it has no place.
_OF_TRAINER = {
    "language": "language",
    "license": "license",
    "tags": "tags",
    "model_name": "name",
    "finetuned_from": "base_model",
    "tasks": "pipeline_tag",
    "dataset_tags": "datasets",
    "dataset": None,
    "dataset_args": None,
}


def write_card_of(trainer: Trainer, output_dir: str | None, *args: Any, **given: Any) -> bool:
    """Writes the card of a trainer's run into output_dir or its own, on the main process.

    args, given: those of `Trainer.create_model_card`
    Returns False where there was no run to write one of, or one of an older version, which the log says.
    """
    run = read_run_file(trainer.args.output_dir)
    if not run or not any("loss" in entry for entry in trainer.state.log_history):
        return False
    missing = missing_parts(run)
    if missing:
        logger.warning("no model card is written: %s is of an older version and lacks %s", RUN_FILE, ", ".join(missing))
        return False
    given |= dict(zip(_OF_TRAINER, args, strict=False))
    known = {name: value for name, value in given.items() if value and _OF_TRAINER[name]}
    options: dict[str, Any] = {f"{_OF_TRAINER[name]}": value for name, value in known.items()}
    for name in ("tags", "datasets"):
        if isinstance(options.get(name), str):
            options[name] = [options[name]]
    if isinstance(options.get("pipeline_tag"), list):
        options["pipeline_tag"] = options["pipeline_tag"][0]
    options.setdefault("tags", getattr(trainer.model, "model_tags", None))
    options["hub_id"] = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    if trainer.is_world_process_zero():
        write_card(Path(output_dir or trainer.args.output_dir), run, trainer.state, **options)
    return True


def _is_ours(text: str) -> bool:
    found = _SIGNATURE.search(text)
    return found is not None and found.end() == len(text) and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def card_text(
    folder: Path,
    run: Mapping[str, Any],
    state: TrainerState,
    *,
    name: str | None = None,
    hub_id: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    tags: list[str] | None = None,
    **metadata: Any,
) -> str:
    """The text of a card, with no path of this machine in it.

    name: title; by default that of the folder; hub_id: where the model is going to be on the hub
    base_model, datasets: hub ids, by default those that the run has if it has any; tags: beside the package's own
    metadata: more of huggingface_hub's ModelCardData, such as license and language
    """
    base = base_model or run["model"]["name"] or ""
    sources = [data["load"]["source"] for data in run["data"].values() if "load" in data]
    adapter = run["model"]["adapter"]
    data = ModelCardData(
        base_model=base if base_model or _is_hub_id(base) else None,
        datasets=datasets or sorted({source for source in sources if _is_hub_id(source)}) or None,
        library_name="peft" if adapter else "transformers",
        model_name=name or folder.resolve().name,
        tags=list(dict.fromkeys([*TAGS, *([adapter.lower()] if adapter else []), *(tags or [])])),
        **{"pipeline_tag": "text-generation"} | {key: value for key, value in metadata.items() if value is not None},
    )
    start = (
        f"[{base}](https://huggingface.co/{base})" if data.base_model else f"`{Path(base).name}`" if base else "A model"
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {data.model_name}",
        f"{start}, trained with Step-DPO ([Lai et al. 2024](https://arxiv.org/abs/2406.18629)): after the same prompt "
        "and the same right steps, one right reasoning step is preferred over one wrong step.",
        what_was_trained(run, state),
        *_loading(folder, hub_id),
        "## Results",
        "Of the pairs trained on and, where there were any, of held-out pairs; not of a benchmark.",
        results_table(run, state),
        "## Data",
        "\n".join(data_lines(run, paths=False)),
        "## Settings",
        settings_table(run),
        "## Device and versions",
        device_and_versions(run),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n\n"


def _loading(folder: Path, hub_id: str | None) -> list[str]:
    code = how_to_load(folder, hub_id or folder.resolve().name)
    return [] if code is None else ["## Loading", code]


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and not Path(name).exists()
