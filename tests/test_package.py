"""What importing the package costs and needs, its public names, and rules that every file keeps."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import stepdpo_kernels

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("accelerate", "datasets", "matplotlib", "peft", "pyarrow", "rich", "transformers", "triton", "typer")


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that runs `code` in the repository root.

    It gets the least environment that works: this process has imported the package already, and would pass on what
    that changed.
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    needed = ("HOME", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "XDG_CACHE_HOME")
    environment = {name: os.environ[name] for name in needed if name in os.environ}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "runs in plain torch" not in line]  # a missing extension
    assert not said, result.stderr
    return result.stdout


def tracked_files() -> list[Path]:
    """Files under version control, or all files where this is no checkout."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = result.stdout.split("\0") if result.returncode == 0 else []
    files = [ROOT / name for name in names if name] or [
        path for path in ROOT.rglob("*") if not set(path.relative_to(ROOT).parts) & {".venv", ".git", "__pycache__"}
    ]
    return [path for path in files if path.is_file()]


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


# ---- importing ------------------------------------------------------------------------------------------------------

IMPORT = """
    import json, logging, os, random, sys, threading, time, warnings
    import numpy.typing, torch

    def state():
        loggers = [logging.getLogger(), logging.getLogger("stepdpo_kernels")]
        return {
            "environment": dict(os.environ),
            "logging": [(logger.level, str(logger.handlers)) for logger in loggers],
            "warnings": str(warnings.filters),
            "threads": (threading.active_count(), torch.get_num_threads()),
            "torch": (str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled()),
            "random": (torch.initial_seed(), str(random.getstate()), str(numpy.random.get_state())),
        }

    before, modules = state(), set(sys.modules)
    start = time.perf_counter()
    import stepdpo_kernels
    seconds = time.perf_counter() - start
    bare = sorted(set(sys.modules) - modules)
    from stepdpo_kernels import StepDPOLoss, StepPair, linear_logprob, load_step_pairs, pack_pairs, use_impl
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    print(json.dumps({
        "seconds": seconds, "bare": bare, "all": sorted(set(sys.modules) - modules), "changed": changed
    }))
    """


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a fresh interpreter saw when it imported the package and then the names that need no transformers."""
    return json.loads(run_python(IMPORT))


def test_import_loads_nothing_but_itself(imported: dict[str, Any]) -> None:
    foreign = {name.partition(".")[0] for name in imported["bare"]} - sys.stdlib_module_names
    assert foreign == {"stepdpo_kernels"}
    assert "stepdpo_kernels._C" not in imported["bare"]


def test_core_names_load_no_optional_package(imported: dict[str, Any]) -> None:
    assert not {name.partition(".")[0] for name in imported["all"]} & set(OPTIONAL)


def test_import_has_no_side_effects(imported: dict[str, Any]) -> None:
    assert imported["changed"] == []


def test_import_takes_under_a_second_beyond_torch(imported: dict[str, Any]) -> None:
    print(f"import stepdpo_kernels: {imported['seconds']:.4f} s beyond torch")
    # It takes about a hundredth of that: this fails when something heavy is imported, not when the machine is busy.
    assert imported["seconds"] < 1


def test_core_works_without_optional_packages() -> None:
    code = f"""
        import sys
        for name in {(*OPTIONAL, "stepdpo_kernels._C")!r}:
            sys.modules[name] = None  # importing it raises ImportError
        import torch
        from stepdpo_kernels import PackedBatch, StepDPOLoss, StepPair, linear_logprob, pack_pairs, use_impl
        pairs = [StepPair([1, 2, 3], [4, 5], [6], group="a"), StepPair([1, 2, 3, 4], [7], [8, 9], group="a")]
        (batch,) = pack_pairs(pairs, max_tokens=64)
        assert isinstance(batch, PackedBatch)
        hidden = torch.randn(batch.num_tokens, 8, requires_grad=True)
        weight = torch.randn(16, 8, requires_grad=True)
        output = StepDPOLoss(beta=0.1).packed(hidden, weight, batch, torch.zeros(4))
        output.loss.backward()
        assert hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0
        with use_impl("reference"):
            linear_logprob(hidden, weight, torch.zeros(batch.num_tokens, dtype=torch.int64))
        try:
            from stepdpo_kernels import packed_forward
        except ImportError as error:
            assert "transformers" in str(error)
        else:
            raise AssertionError("packed_forward came without transformers")
        print("done")
        """
    assert run_python(code).strip() == "done"


# ---- public names ---------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert len(stepdpo_kernels.__all__) <= 12
    assert len(set(stepdpo_kernels.__all__)) == len(stepdpo_kernels.__all__)
    for name in stepdpo_kernels.__all__:
        value = getattr(stepdpo_kernels, name)
        assert value.__name__ == name
        assert value.__doc__, name
    assert set(stepdpo_kernels.__all__) <= set(dir(stepdpo_kernels))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = stepdpo_kernels.no_such_name


def test_version_is_that_of_the_metadata() -> None:
    try:
        installed = importlib.metadata.version("stepdpo-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert installed == stepdpo_kernels.__version__


def test_typing_marker_is_packaged() -> None:
    assert (Path(stepdpo_kernels.__file__).parent / "py.typed").is_file()
    assert 'stepdpo_kernels = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


# ---- every file -----------------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.}>])/(?:home|root|Users|work|mnt)/\w")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
LONGEST = 700


def broken_rules(name: str, text: str) -> list[str]:
    """Which of the rules for all files a file breaks, and where."""
    broken = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        for pattern, what in ((MACHINE_PATH, "path of one machine"), (UNFINISHED, "unfinished")):
            if match := pattern.search(line):
                broken.append(f"{name}:{number}: {what}: {match[0]}")
    written = name.endswith((".py", ".cpp", ".cu", ".h", ".md")) and not name.startswith("benchmarks/results/")
    if len(lines) > LONGEST and written:  # and not a program's report
        broken.append(f"{name}: {len(lines)} lines")
    return broken


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("open('/" + "home/me/data')", True),
        ("cd /" + "root/x", True),
        ("x = 1  # TO" + "DO later", True),
        ("x\n" * 701, True),
        ("x\n" * 700, False),
        ("https://example.org/home/page and src/work/x", False),
    ],
)
def test_rules_notice_a_bad_file(text: str, broken: bool) -> None:
    assert bool(broken_rules("sample.py", text)) == broken


def test_every_file_keeps_the_rules() -> None:
    texts = {str(path.relative_to(ROOT)): text_of(path) for path in tracked_files()}
    assert "stepdpo_kernels/__init__.py" in texts
    assert [line for name, text in texts.items() if text is not None for line in broken_rules(name, text)] == []
