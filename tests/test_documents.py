"""The documents tell the truth: their Python runs, and the paths, commands, names and options they mention exist.

What is checked, in every Markdown file under version control:

    ```python      blocks run in order, in one namespace for each document, on tiny models on the CPU
    ```tree        an indented listing of folders and files, all of which exist; the README's names every part
    ```sh          and inline code: `make` targets, `stepdpo` subcommands and options, extras, environment variables
    `some/path`    inline code with a slash or a source file's suffix exists in the repository, as do links
    `stepdpo_kernels.a.b`   imports
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".md", ".toml", ".txt", ".cpp", ".png", ".ini", ".in")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Problem = tuple[int, str]
COMMAND_GROUPS = ("prepare",)  # of subcommands


def documents() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    names = result.stdout.split("\0") if result.returncode == 0 else []
    return [ROOT / name for name in names if name and (ROOT / name).is_file()] or sorted(ROOT.glob("*.md"))


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """Fenced blocks in one of the languages, each with the number of its first line."""
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in FENCE.finditer(text) if m[1] in languages]


def without_blocks(text: str) -> str:
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def inline_code(text: str) -> Iterator[tuple[int, str]]:
    prose = without_blocks(text)
    for match in re.finditer(r"`([^`\n]+)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, match[1]


def commands(text: str) -> Iterator[tuple[int, str]]:
    """Command lines: those of shell blocks, continuation lines joined, and inline code."""
    for start, block in blocks(text, "sh", "bash", "console"):
        joined = re.sub(r"\\\n\s*", lambda match: " ", block)
        for number, line in enumerate(joined.splitlines()):
            yield start + number, line.partition(" #")[0].strip().removeprefix("$ ")
    yield from inline_code(text)


# ---- what there is --------------------------------------------------------------------------------------------------


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def cli_help(*subcommand: str) -> str | None:
    """What `stepdpo SUBCOMMAND --help` prints, None where there is no such subcommand."""
    from stepdpo_kernels.cli import main

    output, arguments = io.StringIO(), sys.argv
    sys.argv = ["stepdpo", *subcommand, "--help"]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            status = main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = arguments
    return re.sub(r"\x1b\[[\d;]*m", "", output.getvalue()) if not status else None


@cache
def environment_variables() -> set[str]:
    names: set[str] = set()
    for folder, patterns in ((ROOT, ("*.py", "Makefile")), (ROOT / "csrc", ("**/*",))):
        for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
            names |= set(re.findall(r"\bSTEPDPO_\w+", path.read_text(errors="ignore")))
    for path in (*(ROOT / "stepdpo_kernels").rglob("*.py"), *(ROOT / "tests").rglob("conftest.py")):
        names |= set(re.findall(r"\bSTEPDPO_\w+", path.read_text()))
    return names


# ---- checks: text of a document and its folder -> what is wrong, by line --------------------------------------------


def is_path(word: str) -> bool:
    """Whether inline code means a file or folder of the repository, and not a hub id or a file of the reader's."""
    if not re.fullmatch(r"[\w.*/-]+", word) or word.startswith(("/", "-")):
        return False
    first, slash, _ = word.partition("/")
    if first == "runs":  # what commands write
        return False
    return word.endswith(SUFFIXES) or bool(slash and (ROOT / first).exists()) or word.endswith("/")


def exists(word: str, folder: Path) -> bool:
    return any(base.joinpath(word).exists() or ("*" in word and any(base.glob(word))) for base in (ROOT, folder))


def missing_paths(text: str, folder: Path) -> Iterator[Problem]:
    for line, word in inline_code(text):
        if is_path(word) and not exists(word, folder):
            yield line, f"no such path: {word}"
    prose = without_blocks(text)
    for match in re.finditer(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", prose):
        target, line = match[1] or match[2], prose.count("\n", 0, match.start()) + 1
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        if path and not (folder / path).exists():
            yield line, f"link to a missing file: {path}"
        elif not path and anchor not in headings(text):
            yield line, f"link to a missing heading: #{anchor}"


def headings(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def tree_paths(block: str) -> Iterator[tuple[int, str]]:
    """(line, path) of an indented listing, two blanks a level: `name  what it is`."""
    parents: list[str] = []
    for number, line in enumerate(block.splitlines()):
        if line.strip():
            depth = (len(line) - len(line.lstrip())) // 2
            for name in line.strip().split("  ")[0].split(", "):
                parents[depth:] = [name.strip().rstrip("/")]
                yield number, "/".join(parents)


def missing_in_tree(text: str, folder: Path) -> Iterator[Problem]:
    for start, block in blocks(text, "tree"):
        for number, path in tree_paths(block):
            if not exists(path, folder):
                yield start + number, f"no such path in the tree: {path}"


def unknown_commands(text: str, folder: Path) -> Iterator[Problem]:
    for line, command in commands(text):
        words = command.split()
        if words[:1] == ["make"]:
            for target in (word for word in words[1:] if "=" not in word and not word.startswith("-")):
                if target not in make_targets():
                    yield line, f"no make target {target}"
        if words[:1] == ["stepdpo"] and len(words) > 1:
            yield from ((line, problem) for problem in stepdpo_problems(words[1:]))
        if words[1:2] == ["-m"] and words[0].startswith("python") and len(words) > 2 and not find_module(words[2]):
            yield line, f"no module {words[2]}"
        if "pip install" in command:
            extras = {name for group in re.findall(r"\[([\w,-]+)\]", command) for name in group.split(",")}
            for extra in sorted(extras - known_extras()):
                yield line, f"no extra {extra}"
        for name in re.findall(r"\bSTEPDPO_\w+", command):
            if name not in environment_variables():
                yield line, f"no environment variable {name}"


def stepdpo_problems(words: list[str]) -> Iterator[str]:
    if words[0].startswith("-"):
        return
    names = words[:2] if words[0] in COMMAND_GROUPS and len(words) > 1 else words[:1]
    subcommand = " ".join(names)
    help_text = cli_help(*names)
    if help_text is None:
        yield f"no subcommand stepdpo {subcommand}"
        return
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text):
            yield f"stepdpo {subcommand} has no option {option}"


def find_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file() or name.partition(".")[0] in ("pip", "venv", "pytest")


@cache
def known_extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def unknown_names(text: str, folder: Path) -> Iterator[Problem]:
    for line, word in inline_code(text):
        if re.fullmatch(r"stepdpo_kernels(\.\w+)+", word) and not word.endswith(SUFFIXES):
            try:
                pkgutil.resolve_name(word)
            except (ImportError, AttributeError) as error:
                yield line, f"{word}: {error}"


CHECKS = (missing_paths, missing_in_tree, unknown_commands, unknown_names)


def problems(text: str, folder: Path = ROOT) -> list[str]:
    return [f"line {line}: {what}" for check in CHECKS for line, what in check(text, folder)]


def run_python_blocks(text: str, name: str) -> dict[str, Any]:
    """Runs the Python of a document as one program; a traceback shows the document's own line numbers."""
    namespace: dict[str, Any] = {"__name__": "__document__"}
    for start, source in blocks(text, "python"):
        exec(compile("\n" * (start - 1) + source, name, "exec"), namespace)
    return namespace


# ---- the documents --------------------------------------------------------------------------------------------------


@pytest.fixture
def readers_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    step_records: Callable[..., list[dict[str, str]]],
) -> Path:
    """A folder with `pairs.jsonl`, where every model and tokenizer that is loaded by name is a tiny one."""
    import transformers

    lines = [json.dumps(record) for record in step_records(4, 4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model("qwen2"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer("qwen2"))
    return tmp_path


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_mentions_exists(path: Path) -> None:
    assert problems(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    "path",
    [path for path in documents() if path != ROOT / "README.md"],  # which runs below
    ids=lambda path: str(path.relative_to(ROOT)),
)
@pytest.mark.usefixtures("readers_machine")
def test_python_of_a_document_runs(path: Path) -> None:
    run_python_blocks(path.read_text(), str(path))


@pytest.mark.usefixtures("readers_machine")
def test_readme_before_and_after_give_the_same_loss() -> None:
    readme = run_python_blocks((ROOT / "README.md").read_text(), "README.md")
    model, pairs, loss_fn = readme["model"].eval(), readme["pairs"], readme["loss_fn"]
    ref_logps = -10 * torch.rand(2 * len(pairs))  # by pair, chosen first
    by_hand = readme["loss_by_hand"](model, *readme["pad"](pairs), ref_logps)
    torch.testing.assert_close(readme["loss_from_hidden"](model, *readme["pad"](pairs), ref_logps), by_hand)

    (batch,) = readme["pack_pairs"](pairs, max_tokens=100_000)
    in_batch = ref_logps.view(2, -1)[:, batch.pair_index].flatten()
    hidden = readme["packed_forward"](model, batch)
    torch.testing.assert_close(loss_fn.packed(hidden, readme["head"], batch, in_batch).loss, by_hand)

    before = readme["head"].clone()
    readme["train_by_hand"](model, torch.optim.SGD(model.parameters(), lr=0.1), [(pairs, ref_logps)])
    assert not torch.equal(readme["head"], before)


def test_readme_has_python_and_its_tree_is_complete() -> None:
    text = (ROOT / "README.md").read_text()
    assert blocks(text, "python")
    named = {path for _, block in blocks(text, "tree") for _, path in tree_paths(block)}
    parts = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "stepdpo_kernels").glob("*/__init__.py")}
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_folders()}
    assert (parts | tops) - named == set()


def tracked_folders() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in result.stdout.split("\0") if "/" in name and not name.startswith(".")]


# ---- the checks themselves ------------------------------------------------------------------------------------------

GOOD = """# A title, of two parts

See `pyproject.toml`, `stepdpo_kernels/types.py`, `tests/*.py`, `Qwen/Qwen2-7B`, `pairs.jsonl`, [tests](tests),
[here](#a-title-of-two-parts), [there](https://example.org/none.md) and `stepdpo_kernels.types.StepPair`.

```sh
make PY=python test   # runs them
pip install -e '.[train,dev]'
STEPDPO_IMPL=reference python -m pytest
stepdpo inspect pairs.jsonl
```

```tree
stepdpo_kernels/  the package
  types.py        what all share
  packing/
    trie.py, bins.py
tests/
```
"""


def test_a_good_document_has_no_problems() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("See `stepdpo_kernels/no_such.py`.", "no such path: stepdpo_kernels/no_such.py"),
        ("See `no_such.md`.", "no such path: no_such.md"),
        ("See `no_such_folder/`.", "no such path: no_such_folder/"),
        ("See `tests/*.nothing`.", "no such path"),
        ("See [that](no_such.png).", "link to a missing file: no_such.png"),
        ('<img alt="x" src="no_such.png">', "link to a missing file: no_such.png"),
        ("See [that](#nowhere).", "link to a missing heading"),
        ("Run `make no_such_target`.", "no make target no_such_target"),
        ("```sh\nmake no_such_target\n```\n", "line 2: no make target"),
        ("```sh\nmake test no_such_target\n```\n", "no make target no_such_target"),
        ("```sh\nstepdpo no_such_command x\n```\n", "no subcommand stepdpo no_such_command"),
        ("```sh\nstepdpo prepare nothing x\n```\n", "no subcommand stepdpo prepare nothing"),
        ("```sh\nstepdpo prepare collect x --nothing\n```\n", "stepdpo prepare collect has no option --nothing"),
        ("```sh\nstepdpo train \\\n  --no-such-option 1\n```\n", "stepdpo train has no option --no-such-option"),
        ("```sh\npython -m no_such_module\n```\n", "no module no_such_module"),
        ("```sh\npip install '.[no_such_extra]'\n```\n", "no extra no_such_extra"),
        ("Set `STEPDPO_NO_SUCH" + "_VARIABLE=1`.", "no environment variable"),
        ("```tree\nstepdpo_kernels/\n  no_such.py  x\n```\n", "line 3: no such path in the tree"),
        ("Call `stepdpo_kernels.no_such`.", "stepdpo_kernels.no_such"),
        ("Call `stepdpo_kernels.types.NoSuch`.", "NoSuch"),
    ],
)
def test_checks_notice_a_bad_document(text: str, said: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert said in found[0]


def test_python_blocks_share_names_and_keep_line_numbers() -> None:
    text = "Text\n\n```python\na = 1\n```\n\n```python\nb = a + 1\n```\n"
    assert run_python_blocks(text, "sample.md")["b"] == 2
    with pytest.raises(NameError) as failure:
        run_python_blocks(text + "\n```python\nnot_defined\n```\n", "sample.md")
    assert failure.traceback[-1].lineno + 1 == 12
    assert os.path.basename(str(failure.traceback[-1].path)) == "sample.md"
