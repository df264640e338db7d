"""The output folder of a run: whose it is, what made it, and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import stepdpo_kernels
from stepdpo_kernels.types import StepDPOError

RUN_FILE = "stepdpo_run.json"


def check_output_dir(output_dir: str | os.PathLike[str], resuming: bool) -> None:
    """Raises StepDPOError when the folder holds another run, or anything else that this one could overwrite."""
    folder = Path(output_dir)
    if resuming or not folder.exists():
        return
    if not folder.is_dir():
        raise StepDPOError(f"output_dir {str(folder)!r} is a file: name a folder")
    if (folder / RUN_FILE).exists() or any(folder.glob("checkpoint-*")):
        raise StepDPOError(
            f"output_dir {str(folder)!r} holds another run: choose a new folder, or continue that run with "
            "resume_from_checkpoint"
        )
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise StepDPOError(f"output_dir {str(folder)!r} holds a model: choose a new folder")


def write_run_file(output_dir: str | os.PathLike[str], description: dict[str, Any]) -> None:
    """Writes RUN_FILE: the resolved configuration, fingerprints and versions of a run."""
    versions = {
        "python": platform.python_version(),
        "stepdpo_kernels": stepdpo_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = Path(output_dir) / RUN_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**description, "versions": versions}, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def read_run_file(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_run_file` wrote, or {}."""
    path = Path(output_dir) / RUN_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def staged(run_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder beside the checkpoints, gone afterwards whatever happens."""
    folder = Path(run_dir) / ".incomplete"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
