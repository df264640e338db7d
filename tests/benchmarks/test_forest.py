"""The `forest` suite from end to end on a tiny model."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command


@pytest.fixture
def inputs(
    tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any], step_records: Callable[..., Any], tmp_path: Path
) -> list[str]:
    folder, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    data.write_text("".join(json.dumps(record) + "\n" for record in step_records(3, 4)))
    return ["--model", str(folder), "--data", str(data)]


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "--suite", "forest", *options])
    command.main()


def test_the_same_pairs_by_every_way_to_share(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_run = ["--pairs", "8", "--max-tokens", "512", "--dtype", "float32", "--repeats", "2", "--threads", "1"]
    run(monkeypatch, *inputs, *of_run, "--output", str(tmp_path / "out"))
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = {row["share"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["none", "pair", "tree"]
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["packages"]["torch"] != "absent"
    none, pair, tree = rows.values()
    assert int(tree["tokens"]) < int(pair["tokens"]) < int(none["tokens"])
    assert float(pair["tokens_saved"]) == pytest.approx(int(none["tokens"]) / int(pair["tokens"]))
    for row in rows.values():
        assert float(row["loss"]) == pytest.approx(float(none["loss"]), rel=1e-5)
        assert row["memory_pairs"] == none["memory_pairs"]
        assert row["rounds"] == "2"
        assert float(row["seconds"]) > 0
    told = capsys.readouterr().out
    assert "8 pairs, grouped, float32, 512 tokens a batch" in told


def test_more_pairs_than_there_are(inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"share=none: .*pairs\.jsonl has 12 pairs, not 13"):
        run(monkeypatch, *inputs, "--pairs", "13", "--threads", "1")


def test_a_model_goes_with_its_data(inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--model and --data go together"):
        run(monkeypatch, *inputs[:2])
