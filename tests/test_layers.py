"""The layer contracts of pyproject.toml hold, and each of them can fail: shown on packages made for that."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).resolve().parent.parent

# Which parts of the package each part may import.
MAY_IMPORT = {
    "types": set(),
    "_dispatch": set(),
    "_bars": set(),
    "_errors": set(),
    "answers": set(),
    "data": {"answers"},
    "packing": {"data"},
    "ops": set(),
    "model": {"ops", "packing"},
    "loss": {"ops"},
    "trainer": {"data", "packing", "model", "loss"},
    "evaluation": {"answers", "data"},
    "integrations": {"data", "packing", "model", "loss", "trainer"},
    "cli": {"answers", "data", "packing", "ops", "model", "loss", "trainer", "evaluation"},
}
FOR_ALL = {"types", "_dispatch", "_bars", "_errors"}
WITHOUT_TRANSFORMERS = {"types", "_dispatch", "ops", "packing", "loss"}
OUTSIDE = {"benchmarks", "examples", "tests"}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with the project's own contracts on the package in a folder."""
    code = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as f; f()"
    config = str(ROOT / "pyproject.toml")
    command = [sys.executable, "-c", code, "--config", config, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def make_package(folder: Path, imports: dict[str, set[str]]) -> None:
    """A package of all parts, each a folder with one module, where part `a` imports the modules `imports[a]`."""
    package = folder / "stepdpo_kernels"
    for part in MAY_IMPORT:
        (package / part).mkdir(parents=True)
        (package / part / "__init__.py").touch()
        lines = [f"import {name}" for name in sorted(imports[part])]
        (package / part / "module.py").write_text("\n".join(lines))
    # The public names: the one file that may import everything.
    (package / "__init__.py").write_text("\n".join(f"import stepdpo_kernels.{part}.module" for part in MAY_IMPORT))


def modules(parts: set[str]) -> set[str]:
    return {f"stepdpo_kernels.{part}.module" for part in parts}


def test_contracts_keep_all_that_is_allowed(tmp_path: Path) -> None:
    make_package(tmp_path, {part: modules(may | FOR_ALL - {part}) for part, may in MAY_IMPORT.items()})
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_contracts_break_on_each_import_that_is_not_allowed(tmp_path: Path) -> None:
    forbidden = {part: set(MAY_IMPORT) - may - FOR_ALL - {part} for part, may in MAY_IMPORT.items()}
    outside = {part: OUTSIDE | ({"transformers"} if part in WITHOUT_TRANSFORMERS else set()) for part in MAY_IMPORT}
    make_package(tmp_path, {part: modules(forbidden[part]) | outside[part] for part in MAY_IMPORT})
    result = lint(tmp_path)
    assert result.returncode != 0
    assert " 0 kept" in result.stdout, result.stdout
    missing = [
        (part, name)
        for part in MAY_IMPORT
        for name in modules(forbidden[part]) | outside[part]
        if f"stepdpo_kernels.{part}.module -> {name} (" not in result.stdout
    ]
    assert not missing, result.stdout


def test_every_part_has_a_contract() -> None:
    parts = {path.parent.name for path in (ROOT / "stepdpo_kernels").glob("*/__init__.py")}
    parts |= {path.stem for path in (ROOT / "stepdpo_kernels").glob("*.py")} - {"__init__"}
    assert parts <= set(MAY_IMPORT)


def imports_of(source: str) -> set[str]:
    """Top-level names of all modules that Python source imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_benchmarks_and_examples_do_without_tests() -> None:
    assert imports_of("def f():\n    from tests.conftest import x") == {"tests"}
    files = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if "tests" in imports_of(path.read_text())] == []


def public_names_taken(source: str) -> list[str]:
    """Names that source takes from the package's top level, which is for users: parts import from parts."""
    from_top = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module == "stepdpo_kernels"
    ]
    return [a.name for node in from_top for a in node.names if a.name not in (*MAY_IMPORT, "__version__")]


def test_no_part_imports_through_the_public_names() -> None:
    sample = "from stepdpo_kernels import _dispatch, StepDPOLoss\nfrom stepdpo_kernels.types import StepPair"
    assert public_names_taken(sample) == ["StepDPOLoss"]
    files = (ROOT / "stepdpo_kernels").rglob("*.py")
    assert [path for path in files if public_names_taken(path.read_text())] == []
