"""The output folder of a run: whose it is, what made it, and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

import stepdpo_kernels
from stepdpo_kernels.data import StepPairDataset
from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.types import StepDPOError, StepPair

RUN_FILE = "stepdpo_run.json"
_PARTS = ("config", "model", "pairs", "data", "device", "versions", "reference", "reference_pass")
_TORCH_SAVE = re.compile("inline_container|PytorchStreamWriter")  # its words for a failed write


def check_writable(folder: Path) -> None:
    """Raises StepDPOError for an output_dir that is a file or that nothing can be put into."""
    if folder.exists() and not folder.is_dir():
        raise StepDPOError(f"output_dir {str(folder)!r} is a file: name a folder")
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise StepDPOError(
            f"output_dir {str(folder)!r} cannot be written to: {str(nearest)!r} is read-only for this user"
        )


def check_output_dir(output_dir: str | os.PathLike[str], resume: str | bool | None) -> Path | None:
    """The checkpoint to go on from; None to start at the beginning.

    resume: as in `Trainer.train`: True for the last checkpoint in output_dir, or the path of one

    A run that was stopped before its first checkpoint is resumed at its beginning. Raises StepDPOError when there is
    nothing to resume, and when the folder holds another run or anything else that this one could overwrite.
    """
    folder = Path(output_dir)
    check_writable(folder)
    if resume is True:
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is not None:
            return _whole_checkpoint(Path(last))
        if not (folder / RUN_FILE).is_file():
            raise StepDPOError(
                f"output_dir {str(folder)!r} holds no run to resume: leave resume_from_checkpoint out to start one"
            )
        return None
    checkpoint = _whole_checkpoint(Path(resume)) if resume else None
    if checkpoint is not None and checkpoint.resolve().parent == folder.resolve():
        return checkpoint
    if (folder / RUN_FILE).exists() or any(folder.glob("checkpoint-*")):
        raise StepDPOError(
            f"output_dir {str(folder)!r} holds another run: choose a new folder, or continue that run with "
            "resume_from_checkpoint"
        )
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise StepDPOError(f"output_dir {str(folder)!r} holds a model: choose a new folder")
    return checkpoint


# Where the state of the optimiser is: as a rule, whole or sharded by FSDP2, and by DeepSpeed (a file that names it).
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")


def _whole_checkpoint(checkpoint: Path) -> Path:
    missing = [] if (checkpoint / "trainer_state.json").is_file() else ["trainer_state.json"]
    missing += [] if any((checkpoint / name).exists() for name in _OPTIMIZER) else [_OPTIMIZER[0]]
    if missing:
        raise StepDPOError(
            f"resume_from_checkpoint: {str(checkpoint)!r} lacks {' and '.join(missing)}, so it is no checkpoint that "
            "training can go on from: name a folder checkpoint-<step> that was saved without save_only_model"
        )
    return checkpoint


def describe_run(
    args: TrainingArguments, model: nn.Module, train: Sequence[StepPair], evaluation: Sequence[StepPair] | None = None
) -> dict[str, Any]:
    """What a run is made of, for `write_run_file`: configuration, model, data, device and versions."""
    trainable, every = count_parameters(model)
    data = {"train": train} if evaluation is None else {"train": train, "eval": evaluation}
    return {
        "config": _settings(args),
        "model": {
            "name": causal_lm(model).config._name_or_path,
            "type": causal_lm(model).config.model_type,
            "adapter": getattr(model, "peft_type", None),
            "trainable_parameters": trainable,
            "parameters": every,
        },
        "pairs": len(train),
        "data": {name: describe_pairs(pairs) for name, pairs in data.items()},
        "device": describe_device(args),
        "versions": versions(),
    }


def _settings(args: TrainingArguments) -> dict[str, Any]:
    settings = {k: v if _is_finite(v) else str(v) for k, v in args.to_dict().items()}
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def settings_now(run: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a run file says were in force last: of its beginning, and what changed where it was resumed."""
    settings = dict(run["config"])
    for part in run.get("resumed", []):
        settings |= part["config"]
    return settings


def changed_settings(run: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """What differs from the settings that a run file says were in force last."""
    before = settings_now(run)
    return {name: value for name, value in _settings(args).items() if name not in before or before[name] != value}


def describe_pairs(pairs: Sequence[StepPair]) -> dict[str, Any]:
    """Number and fingerprint of the pairs, and of which load they are (part of) what was kept, where that is known."""
    dataset = pairs if isinstance(pairs, StepPairDataset) else StepPairDataset(pairs[i] for i in range(len(pairs)))
    description: dict[str, Any] = {"pairs": len(dataset), "fingerprint": dataset.fingerprint}
    report = dataset.report
    if report.source:
        description["load"] = {
            "source": report.source,
            "files": list(report.files),
            "records": report.records,
            "kept": report.kept,
            "left_out": dict(report.dropped),
        }
    return description


def describe_device(args: TrainingArguments) -> dict[str, Any]:
    """Of this process, with the number of processes."""
    device = args.device
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python, this package and those libraries under it that are installed."""
    found = {"python": platform.python_version(), "stepdpo_kernels": stepdpo_kernels.__version__}
    for name in ("torch", "triton", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found["torch"] = torch.__version__  # with its build
    if torch.version.cuda is not None and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all), counting weights that DeepSpeed has elsewhere and those packed two to a byte."""
    trainable = every = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        every += count
        trainable += count if parameter.requires_grad else 0
    return trainable, every


def write_run_file(output_dir: str | os.PathLike[str], description: dict[str, Any]) -> None:
    """Writes RUN_FILE, for example of what `describe_run` gives."""
    _write_json(Path(output_dir) / RUN_FILE, _without_nonfinite(description))


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str, allow_nan=False) + "\n")
    os.replace(temporary, path)


def to_standard_json(path: Path) -> None:
    """Rewrites a file in which Python's json put NaN or Infinity, which JSON does not have, with null there."""
    value = json.loads(path.read_text())
    clean = _without_nonfinite(value)
    if clean != value:
        _write_json(path, clean)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    return value if _is_finite(value) else None


def read_run_file(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_run_file` wrote, or {}."""
    path = Path(output_dir) / RUN_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def missing_parts(run: Mapping[str, Any]) -> list[str]:
    """What a run file of today has and that of an older version lacks; a resumed run adds it."""
    return [part for part in _PARTS if part not in run]


def remove_unstarted_run(output_dir: str | os.PathLike[str]) -> None:
    """Removes RUN_FILE of a run that has no checkpoint yet, so that the same command can be given again."""
    folder = Path(output_dir)
    if not any(folder.glob("checkpoint-*")):
        (folder / RUN_FILE).unlink(missing_ok=True)


@contextmanager
def explained(what: str, output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """A failure to write becomes a StepDPOError that says what is there to go on from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_SAVE.search(str(error)):
            raise
        last = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
        left = "there is no checkpoint yet" if last is None else f"the last checkpoint, {last!r}, is as it was"
        raise StepDPOError(
            f"{what} could not be written to {str(output_dir)!r}: {error}; {left}. See to space and permissions, then "
            "go on with resume_from_checkpoint"
        ) from error


@contextmanager
def staged(target: str | os.PathLike[str], owner: bool = True) -> Iterator[Path]:
    """A scratch folder inside `target`, gone afterwards whatever happens; made and removed by one owner."""
    folder = Path(target) / ".incomplete"
    if owner:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if owner:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(source: Path, target: Path) -> None:
    """Renames a staged file or folder, also onto one that is there already, which moves aside into the stage."""
    if target.is_dir():
        os.replace(target, source.with_name(f"{source.name}.replaced"))
    os.replace(source, target)


def rotate(run_dir: Path, stage: Path, limit: int | None, best: str | None) -> None:
    """Keeps the newest `limit` checkpoints, among them the last and the best one; the others move to the stage.

    best: its path as it was when it was saved, which may have been written from another working directory
    transformers' own deletes them in place, and a run that is killed meanwhile leaves one without its weights.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_dir), use_mtime=True)]
    kept = {checkpoints[-1], *([run_dir / Path(best).name] if best is not None else [])}
    surplus = len(checkpoints) - max(limit, len(kept)) if limit is not None and limit > 0 else 0
    for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        os.replace(checkpoint, stage / f"{checkpoint.name}.old")
