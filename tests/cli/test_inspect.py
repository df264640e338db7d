"""The command line frame and `stepdpo inspect`: its numbers, its picture, its errors."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepdpo_kernels import StepDPOError, StepPair, load_step_pairs, pack_pairs
from stepdpo_kernels.cli import main, picture
from stepdpo_kernels.cli.inspect import inspect, pairs_to_draw, sharing_costs
from stepdpo_kernels.packing import SHARE_MODES, build_batch, epoch_order, tokens_of_pair
from stepdpo_kernels.packing.reference import padded_batch

ROOT = Path(__file__).resolve().parents[2]
LONG = "apples and " * 1000


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step_records: Callable[..., list[dict[str, str]]],
    tiny_tokenizer: Callable[..., Any],
) -> Path:
    """The working directory: `tokenizer/`, and `pairs.jsonl` of 21 pairs and 4 records that cannot be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tiny_tokenizer("qwen2").save_pretrained("tokenizer")
    records = step_records(3, 7)
    bad = [
        {**records[0], "rejected": records[0]["chosen"]},
        {**records[1], "rejected": "  "},
        {**records[2], "chosen": LONG},
        {**records[3], "chosen": LONG},
    ]
    lines = [json.dumps(record) for record in [*records[:5], *bad, *records[5:]]]
    Path("pairs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def row(output: str, name: str) -> list[str]:
    """The cells of the table row that begins with `name`."""
    (line,) = (line for line in output.splitlines() if re.match(rf" *{re.escape(name)}  ", line))
    return line.strip().removeprefix(name).split()


def load(tokenizer: Any, **options: Any) -> Sequence[StepPair]:
    return load_step_pairs("pairs.jsonl", tokenizer, max_tokens=8192, **options)


# ---- what is printed ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_whole_solutions(capsys: pytest.CaptureFixture[str], step_records: Callable[..., Any]) -> None:
    records = step_records(3, 7)
    Path("solutions.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [*records, {**records[0], "full_chosen": ""}])
    )
    assert run("inspect", "solutions.jsonl", "--tokenizer", "tokenizer", "--unit", "solution") == 0
    out = capsys.readouterr().out
    assert "22 records read, 21 pairs kept" in out
    assert re.search(r"1 left out: empty branch\n +solutions.jsonl, line 22 ", out)
    first = out.partition("The first pair")[2]
    assert re.search(r"prefix, \d+ tokens\n<.im_start.>user\n.*<.im_start.>assistant\n", first, re.DOTALL)
    assert re.search(
        rf"chosen, \d+ tokens\nLet's think .*{re.escape(records[0]['full_chosen'])}<.im_end.>", first, re.DOTALL
    )


@pytest.mark.usefixtures("folder")
def test_records_kept_and_left_out_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "pairs.jsonl", "--tokenizer", "tokenizer") == 0
    captured = capsys.readouterr()
    assert "25 records read, 21 pairs kept" in captured.out
    for reason, lines in (("1 left out: identical branches", (6,)), ("1 left out: empty branch", (7,))):
        assert re.search(rf"{reason}\n +pairs.jsonl, line {lines[0]} ", captured.out)
    assert re.search(r"2 left out: too long\n +pairs.jsonl, line 8 .*\n +pairs.jsonl, line 9 ", captured.out)
    assert captured.err == ""


@pytest.mark.usefixtures("folder")
def test_lengths(capsys: pytest.CaptureFixture[str], tiny_tokenizer: Callable[..., Any]) -> None:
    assert run("inspect", "pairs.jsonl", "--tokenizer", "tokenizer") == 0
    output = capsys.readouterr().out
    pairs = load(tiny_tokenizer("qwen2"))
    for name in ("prefix", "chosen", "rejected"):
        sizes = np.array([getattr(pair, f"{name}_ids").size for pair in pairs])
        low, median, mean, high, most = (float(cell) for cell in row(output, name))
        assert (low, most) == (sizes.min(), sizes.max())
        assert [median, mean] == pytest.approx([np.median(sizes), sizes.mean()], abs=0.5)
        assert high == pytest.approx(np.percentile(sizes, 95), abs=0.5)
    assert row(output, "pairs of a problem") == ["7", "7", "7.0", "7", "7"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("budget", [600, 8192])
def test_what_sharing_saves(
    budget: int, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Callable[..., Any]
) -> None:
    assert run("inspect", "pairs.jsonl", "--tokenizer", "tokenizer", "--max-tokens", str(budget)) == 0
    output = capsys.readouterr().out
    pairs = load(tiny_tokenizer("qwen2"))
    unshared = sum(2 * p.prefix_ids.size + p.chosen_ids.size + p.rejected_ids.size for p in pairs)
    assert f"{unshared:,} tokens" in output
    for share in ("none", "pair", "tree"):
        batches = pack_pairs(pairs, budget, share=share)
        tokens, rows = sum(b.num_tokens for b in batches), sum(b.num_rows for b in batches)
        assert row(output, share) == [
            f"{tokens:,}",
            str(len(batches)),
            f"{tokens / (len(batches) * budget):.1%}",
            f"{unshared / tokens:.2f}×",
            f"{rows:,}",
            f"{rows / unshared:.1%}",
        ]
    padded, number, fill, fewer, *_ = row(output, "8 pairs, padded")
    assert number == "3"
    cells = int(padded.replace(",", ""))
    assert unshared < cells <= padded_batch(pairs)["input_ids"].numel()
    assert (fill, fewer) == (f"{unshared / cells:.1%}", f"{unshared / cells:.2f}×")
    assert "steps of 128 pairs" in output
    # 21 pairs are one step
    assert row(output, "steps, shuffled") == row(output, "steps, by problem") == row(output, "tree")
    packed = {share: sum(b.num_tokens for b in pack_pairs(pairs, budget, share=share)) for share in SHARE_MODES}
    for other, words in (
        (cells, "padded batches of 8 pairs"),
        (packed["none"], "no padding"),
        (packed["pair"], "sharing within pairs"),
    ):
        assert f"{other / packed['tree']:.1f}× fewer than with {words}" in " ".join(output.split())
    assert "grouped" not in output


@pytest.mark.usefixtures("folder")
def test_what_the_steps_of_an_epoch_take(
    capsys: pytest.CaptureFixture[str], tiny_tokenizer: Callable[..., Any]
) -> None:
    assert run("inspect", "pairs.jsonl", "--tokenizer", "tokenizer", "--pairs-per-step", "7") == 0
    output = " ".join(capsys.readouterr().out.split())
    pairs = load(tiny_tokenizer("qwen2"))
    tokens = {}
    for sampling in ("shuffle", "grouped"):
        order = epoch_order(pairs, 0, sampling, pairs_per_step=7)
        batches = [b for at in (0, 7, 14) for b in pack_pairs([pairs[i] for i in order[at : at + 7]], 8192)]
        assert len(batches) == 3
        tokens[sampling] = sum(batch.num_tokens for batch in batches)
    assert f"in shuffled steps of 7 pairs, an epoch encodes {tokens['shuffle']:,} tokens in 3 batches" in output
    assert f"problem by problem, {tokens['grouped']:,} in 3: {tokens['shuffle'] / tokens['grouped']:.1f}×" in output
    # the three problems are the three steps
    assert tokens["grouped"] < tokens["shuffle"] / 1.5


def test_padded_batches_are_counted_as_they_would_be_built() -> None:
    rng = np.random.default_rng(3)
    pairs = [StepPair(*(rng.integers(0, 9, rng.integers(1, 20)) for _ in range(3)), id=str(i)) for i in range(19)]
    order = np.random.default_rng(0).permutation(19)
    batches = [padded_batch([pairs[i] for i in order[start : start + 8]]) for start in (0, 8, 16)]
    cost = sharing_costs(pairs, 1000)["padded"]
    assert (cost.tokens, cost.batches) == (sum(batch["input_ids"].numel() for batch in batches), 3)
    assert cost.rows == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert cost.fill == sum(int(batch["attention_mask"].sum()) for batch in batches) / cost.tokens


def test_a_pair_beyond_the_budget_unshared_gets_its_own_batch() -> None:
    pairs = [StepPair(range(60), range(k), range(50, 53), id=str(k)) for k in (4, 5, 6)]
    costs = sharing_costs(pairs, 100)  # a pair takes 65 to 67 tokens shared, 125 to 127 unshared
    assert costs["none"].batches == 3
    assert costs["none"].tokens == sum(tokens_of_pair(pair, "none") for pair in pairs)
    assert costs["none"].fill == 1.0
    assert costs["pair"].fill == pytest.approx(costs["pair"].tokens / 300)


@pytest.mark.usefixtures("folder")
def test_the_first_pair_is_shown_with_its_boundary(
    capsys: pytest.CaptureFixture[str], tiny_tokenizer: Callable[..., Any]
) -> None:
    assert run("inspect", "pairs.jsonl", "--tokenizer", "tokenizer", "--limit", "3") == 0
    output = capsys.readouterr().out
    tokenizer = tiny_tokenizer("qwen2")
    first = load(tokenizer)[0]
    for name in ("prefix", "chosen", "rejected"):
        ids = getattr(first, f"{name}_ids")
        assert f"{name}, {ids.size} tokens\n{tokenizer.decode(ids)}\n" in output
    for ids in (first.chosen_ids, first.rejected_ids):
        sides = [" ".join(repr(tokenizer.decode([i])) for i in part) for part in (first.prefix_ids[-4:], ids[:4])]
        assert " ┃ ".join(sides) in output


# ---- the picture ----------------------------------------------------------------------------------------------------


def colours_of(path: Path) -> dict[int, int]:
    """Pixels of each kind's colour."""
    with Image.open(path) as image:
        assert image.width == picture.WIDTH * picture.DPI
        pixels = np.asarray(image.convert("RGB"))
    want = {kind: [int(c[i : i + 2], 16) for i in (1, 3, 5)] for kind, c in picture.COLOURS.items()}
    return {kind: int((pixels == colour).all(-1).sum()) for kind, colour in want.items()}


@pytest.mark.parametrize("share", ["tree", "pair", "none"])
def test_a_picture_is_drawn(share: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tokenizer", "tokenizer", "--output", "forest.png", "--share", share, "--pairs", "3")
    assert run("inspect", "pairs.jsonl", *arguments) == 0
    assert "The picture of 3 pairs of one problem is in forest.png" in capsys.readouterr().out
    counts = colours_of(folder / "forest.png")
    assert min(counts.values()) > 1000
    assert {path.name for path in folder.iterdir()} == {"forest.png", "pairs.jsonl", "tokenizer"}


def test_the_pictures_pattern_is_the_mask(tmp_path: Path) -> None:
    """The share of each colour on the right is the share of attended pairs of tokens with keys of that kind."""
    from stepdpo_kernels.ops.tree_attention.reference import dense_mask

    # Few, long branches: no grid is drawn, and lines take little of the area.
    pairs = [StepPair(range(100), range(200, 300), range(300, 450), id="a")]
    batch = build_batch(pairs, [0], "tree")
    picture.draw(batch, lambda ids: "", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    # The square ends 0.24 inches before the right edge and begins 0.78 inches below the upper one.
    side = int(3.4 * picture.DPI)
    right, top = pixels.shape[1] - int(0.24 * picture.DPI), int(0.78 * picture.DPI)
    square = pixels[top : top + side, right - side : right]
    mask, kinds = dense_mask(batch.plan).numpy(), picture.token_kinds(batch)
    for kind, colour in picture.COLOURS.items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        drawn = (square == rgb).all(-1).mean()
        assert drawn == pytest.approx(mask[:, kinds == kind].sum() / mask.size, abs=0.015)


def random_pairs(rng: np.random.Generator, count: int) -> list[StepPair]:
    """Pairs over two tokens, so that they share, nest and end at every place."""
    pairs: list[StepPair] = []
    while len(pairs) < count:
        prefix, chosen, rejected = (rng.integers(0, 2, rng.integers(1, 5)) for _ in range(3))
        if chosen.tolist() != rejected.tolist():
            pairs.append(StepPair(prefix, chosen, rejected, id=str(len(pairs))))
    return pairs


@pytest.mark.parametrize("share", ["tree", "pair", "none"])
def test_runs_hold_every_branch_and_every_token_once(share: str) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pairs = random_pairs(rng, int(rng.integers(1, 6)))
        batch = build_batch(pairs, range(len(pairs)), share)
        trees = picture.forest_runs(batch)
        runs = [run for tree in trees for run in tree.walk()]

        packed = [run.first + i for run in runs for i in range(run.encoded)]
        assert sorted(packed) == list(range(batch.num_tokens))
        for r in runs:
            assert batch.input_ids[r.first : r.first + r.encoded].tolist() == r.tokens[: r.encoded]
            assert all(child.depth == r.end for child in r.children)

        paths: list[list[tuple[int, int]]] = []  # (token, kind) from the root down to the end of each run

        def follow(r: picture.Run, before: list[tuple[int, int]], into: list[list[tuple[int, int]]]) -> None:
            path = [*before, *((token, r.kind) for token in r.tokens)]
            into.append(path)
            for child in r.children:
                follow(child, path, into)

        for tree in trees:
            follow(tree, [], paths)
        texts = [[token for token, _ in path] for path in paths]
        steps: dict[int, set[tuple[int, ...]]] = {picture.CHOSEN: set(), picture.REJECTED: set()}
        for pair in pairs:
            for kind, step in ((picture.CHOSEN, pair.chosen_ids), (picture.REJECTED, pair.rejected_ids)):
                tokens = [*pair.prefix_ids.tolist(), *step.tolist()]
                assert any(text[: len(tokens)] == tokens for text in texts)
                steps[kind] |= {tuple(tokens[: pair.prefix_ids.size + n + 1]) for n in range(step.size)}
        if share != "tree":  # several trees hold the same tokens there
            continue
        for path, text in zip(paths, texts, strict=True):
            for n, (_, kind) in enumerate(path, start=1):
                roles = {role for role, ends in steps.items() if tuple(text[:n]) in ends}
                assert kind == (roles.pop() if len(roles) == 1 else picture.PREFIX)


def test_runs_of_nested_pairs() -> None:
    pairs = [
        StepPair([1, 2], [3, 4], [5, 6], id="a"),
        StepPair([1, 2, 3, 4, 9], [7], [8, 8], id="b"),
        StepPair([1, 2, 3, 4, 9], [10], [8, 8], id="c"),
    ]
    batch = build_batch(pairs, [0, 1, 2], "tree")
    (root,) = picture.forest_runs(batch)

    def shape(run: picture.Run) -> Any:
        return run.kind, run.tokens, run.encoded, picture.tag(run, 3), [shape(child) for child in run.children]

    prefix, chosen, rejected = picture.PREFIX, picture.CHOSEN, picture.REJECTED
    later: list[Any] = [
        (rejected, [8, 8], 1, "rejected 2, 3", []),
        (chosen, [7], 0, "chosen 2", []),
        (chosen, [10], 0, "chosen 3", []),
    ]
    steps = [
        (chosen, [3, 4], 2, "chosen 1", [(prefix, [9], 1, "prefix", later)]),
        (rejected, [5, 6], 1, "rejected 1", []),
    ]
    assert shape(root) == (prefix, [1, 2], 2, "shared prefix", steps)
    assert [run.y for run in root.walk() if not run.children] == [0, 1, 2, 3]
    assert picture.token_kinds(batch).tolist() == [prefix] * 2 + [chosen] * 2 + [prefix, rejected, rejected]
    assert picture.headline(batch) == "3 pairs, 6 branches: 34 tokens unshared → 7 packed, 4.9× fewer"


def test_text_that_does_not_fit_is_shortened() -> None:
    text = "She sells nine of the twenty-four rolls and packs the rest"
    assert picture.fit(text, 1000, 2, keep_end=False) == [text]
    for keep_end in (False, True):
        lines = picture.fit(text, 90, 2, keep_end=keep_end)
        assert len(lines) == 2
        assert all(picture.text_width(line, picture.TEXT_SIZE) <= 90 for line in lines)
        assert lines[0].startswith("She sells")
        assert lines[1].endswith("rest" if keep_end else "…")
    assert "".join(picture.fit("x" * 50, 100, 9, keep_end=False)) == "x" * 50
    assert picture.fit("wide", 1, 2, keep_end=False) == []


def test_any_script_can_be_drawn(tmp_path: Path) -> None:
    batch = build_batch([StepPair([1, 2], [3, 4], [5, 6])], [0], "tree")
    picture.draw(batch, lambda ids: "每条$x$_答案\n<|im_end|>", tmp_path / "a.png")
    assert min(colours_of(tmp_path / "a.png").values()) > 1000


def test_the_pairs_drawn_nest_most() -> None:
    flat = [StepPair([1] * 9, [2, k], [3], id=f"flat {k}", group="flat") for k in range(4)]
    nested = [StepPair([1] * k, [2, k], [3], id=f"nested {k}", group="nested") for k in (5, 5, 6, 7, 8)]
    pairs = [StepPair([1], [2], [3], id="alone"), *flat, *nested]
    assert pairs_to_draw(pairs, 4) == [5, 7, 8, 9]  # one of each prefix, before a second of the same
    assert pairs_to_draw(pairs, 5) == [5, 6, 7, 8, 9]
    assert pairs_to_draw(pairs[:5], 3) == [1, 2, 3]


def test_the_readmes_picture_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "forest.png"
    monkeypatch.setattr(sys, "argv", ["make_forest.py", str(path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "docs" / "make_forest.py"), run_name="__main__")
    assert stop.value.code == 0
    with Image.open(path) as made, Image.open(ROOT / "docs" / "forest.png") as shown:
        assert made.size == shown.size
        difference = np.abs(np.asarray(made.convert("L"), float) - np.asarray(shown.convert("L"), float))
    assert difference.mean() < 2  # of 255: fonts are drawn a little differently by other versions


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pairs.jsonl"], "--tokenizer is needed"),
        (["pairs.jsonl", "--tokenizer", "./nowhere"], "nowhere"),
        (["nowhere.jsonl", "--tokenizer", "tokenizer"], "nowhere.jsonl: no such file"),
        (["pairs.jsonl", "--tokenizer", "tokenizer", "--template", "x"], "template must be one of"),
        (["pairs.jsonl", "--tokenizer", "tokenizer", "--max-tokens", "1"], "max_tokens must be at least 2, got 1"),
        (["pairs.jsonl", "--tokenizer", "tokenizer", "--max-length", "9"], "no record can be used"),
        (["pairs.jsonl", "--tokenizer", "tokenizer", "--output", "forest.jpg"], "must end in .png"),
        (["pairs.jsonl", "--tokenizer", "tokenizer", "--output", "no/forest.png"], "no folder 'no'"),
        (["malformed.jsonl", "--tokenizer", "tokenizer", "--output", "forest.png"], "malformed.jsonl, line 2"),
    ],
)
def test_bad_input_gives_one_message(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "malformed.jsonl").write_text((folder / "pairs.jsonl").read_text().splitlines()[0] + "\n{oops\n")
    before = sorted(folder.rglob("*"))
    assert run("inspect", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect"], "Missing argument 'DATA'"),
        (["inspect", "pairs.jsonl", "--share", "some"], "--share"),
        (["inspect", "pairs.jsonl", "--no-such-option"], "--no-such-option"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_bad_options(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDPO_DEBUG", "1" if how == "environment" else "0")
    with pytest.raises(StepDPOError, match="--tokenizer is needed"):
        main([*(["--debug"] if how == "option" else []), "inspect", "pairs.jsonl"])


@pytest.mark.usefixtures("folder")
def test_a_picture_that_cannot_be_written_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    assert run("inspect", "pairs.jsonl", "--tokenizer", "tokenizer", "--output", "forest.png") == 2
    assert "No space left on device: 'forest.png'" in capsys.readouterr().err
    assert not list(folder.glob("*forest*"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "stepdpo_kernels.trainer", None)
    with pytest.raises(ModuleNotFoundError):  # ours: a broken installation, not a missing extra
        main(["inspect", "pairs.jsonl", "--tokenizer", "x"])
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run("inspect", "pairs.jsonl", "--tokenizer", "x") == 2
    assert "pip install 'stepdpo-kernels[train]'" in capsys.readouterr().err


# ---- the frame ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from stepdpo_kernels.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'matplotlib', 'datasets', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "stepdpo" in done.stdout


def test_train_gets_its_arguments_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr("stepdpo_kernels.cli.train.train", lambda context: got.append(context.args))
    arguments = ["--model", "m", "--max_steps", "3", "--help", "--no-such-option=1", "x"]
    assert run("train", *arguments) == 0
    assert got == [arguments]


def test_inspect_and_train_have_the_same_defaults() -> None:
    from stepdpo_kernels import StepDPOConfig
    from stepdpo_kernels.cli.train import DataAndModel
    from stepdpo_kernels.trainer.config import PAIRS_PER_STEP

    of_train = {
        field.name: field.default for kind in (DataAndModel, StepDPOConfig) for field in dataclasses.fields(kind)
    }
    of_inspect = {name: p.default for name, p in python_inspect.signature(inspect).parameters.items()}
    for name in ("template", "boundary", "unit", "max_length", "limit", "share"):
        assert of_inspect[name] == of_train[name]
    assert of_inspect["max_tokens"] == of_train["max_tokens_per_batch"]
    assert of_inspect["pairs_per_step"] == PAIRS_PER_STEP
