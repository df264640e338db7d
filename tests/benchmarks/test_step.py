"""The `step` suite from end to end on a tiny model."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.step import beside, provider, settings_of


@pytest.fixture
def inputs(
    tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any], step_records: Callable[..., Any], tmp_path: Path
) -> list[str]:
    folder, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    data.write_text("".join(json.dumps(record) + "\n" for record in step_records(4, 4)))
    return ["--model", str(folder), "--data", str(data)]


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> dict[str, list[dict[str, str]]]:
    """Rows by provider."""
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "run", "--suite", "step", "--output", str(output), "--threads", "1", *options]
    )
    command.main()
    rows: dict[str, list[dict[str, str]]] = {}
    with (output / "rows.csv").open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["provider"], []).append(row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_both_trainers_see_the_same_pairs(
    inputs: list[str],
    lora_rank: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl")
    size = ["--pairs-per-step", "4", "--repeats", "2", "--lora-rank", str(lora_rank)]
    names = ["trl-2", "trl-4-unsorted", "ours-300", "ours-300-none", "ours-300-grouped"]
    rows = run(monkeypatch, tmp_path / "out", *inputs, *size, "--providers", *names)
    assert list(rows) == names
    for own in rows.values():
        assert [row["round"] for row in own] == ["0", "1", "2"]
        assert float(own[0]["loss"]) == pytest.approx(0.6931, abs=0.02)  # bfloat16
        assert all(float(row["pairs_per_second"]) < float(row["training_pairs_per_second"]) for row in own)
        assert int(own[0]["peak_bytes"]) > int(own[0]["extra_bytes"]) > 0
    for name in names[:-1]:  # sums over the step's tokens, whatever is padded or shared
        for row, other in zip(rows[name], rows["ours-300"], strict=True):
            assert float(row["logps_chosen"]) == pytest.approx(float(other["logps_chosen"]), rel=0.02)
    assert rows["ours-300-grouped"][0]["logps_chosen"] != rows["ours-300"][0]["logps_chosen"]
    told = capsys.readouterr().out
    assert "beside trl-2" in told
    assert "beside trl-4-unsorted" in told
    assert ("LoRA of rank 2" if lora_rank else "all weights") in told


def test_ratios_are_taken_round_by_round() -> None:
    own, base = (
        [
            {"pairs_per_second": speed, "training_pairs_per_second": 2 * speed, "peak_bytes": peak, "extra_bytes": None}
            for speed in speeds
        ]
        for speeds, peak in (([2.0, 40.0, 6.0], 10), ([1.0, 10.0, 1.0], 40))
    )
    found = beside(own, base)
    assert (found["speed"], found["training_speed"], found["memory"]) == (4.0, 4.0, 0.25)
    assert "extra_memory" not in found


def test_names_of_providers() -> None:
    assert settings_of("ours", 77)["at_once"] == 77
    assert settings_of("ours-512-grouped", 77) == settings_of("ours", 512) | {"sampling": "grouped"}
    assert settings_of("trl-8-unsorted", 77) == settings_of("trl", 77) | {"at_once": 8, "sorted": False}
    for wrong in ("theirs", "ours-unsorted", "trl-0", "trl-grouped"):
        with pytest.raises(Exception, match=wrong.split("-")[0]):
            provider(wrong)


def test_pairs_at_once_divide_a_step(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="trl-3: 3 pairs at once do not divide --pairs-per-step 32"):
        run(monkeypatch, tmp_path / "out", *inputs, "--providers", "trl-3")


def test_more_pairs_than_there_are(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"ours: ended with status 1: .*has 16 pairs, not 18"):
        run(monkeypatch, tmp_path / "out", *inputs, "--pairs-per-step", "6", "--repeats", "2", "--providers", "ours")
