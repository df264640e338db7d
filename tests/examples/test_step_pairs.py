"""Step pairs written for other trainers."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("datasets")

from datasets import load_from_disk

from examples.llama_factory import tokenize_pairs
from examples.openrlhf import write_pairs
from stepdpo_kernels.types import StepDPOError


@pytest.fixture
def written(tmp_path, monkeypatch, tiny_tokenizer):
    """Runs a program on records, and gives what it writes."""
    tiny_tokenizer("qwen2").save_pretrained(tmp_path)

    def run(program, records):
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
        files = {"--tokenizer": tmp_path, "--output": tmp_path / "output"}
        options = [str(word) for pair in files.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "pairs.jsonl"), *options])
        program.main()
        return tmp_path / "output"

    return run


def test_openrlhf_gets_prefixes_and_steps(written, step_records) -> None:
    records = step_records(2, 4)
    lines = written(write_pairs, records).read_text().splitlines()
    for record, pair in zip(records, map(json.loads, lines), strict=True):
        assert pair["prompt"].endswith("<|im_start|>assistant\n" + record["initial_reason_steps"])
        assert (pair["chosen"], pair["rejected"]) == (record["chosen"], record["rejected"])


def test_llama_factory_gets_tokens_and_labels(written, step_records, tiny_tokenizer) -> None:
    records = {record["chosen"]: record for record in step_records(2, 4)}
    tokenizer = tiny_tokenizer("qwen2")
    rows = load_from_disk(written(tokenize_pairs, [*records.values()]))["train"]
    assert len(rows) == len(records)
    for row in rows:
        step = [label for label in row["chosen_labels"] if label != -100]
        record = records[tokenizer.decode(step)]
        assert tokenizer.decode(row["chosen_input_ids"]).endswith(record["initial_reason_steps"] + record["chosen"])
        assert tokenizer.decode(row["rejected_input_ids"]).endswith(record["rejected"])


@pytest.mark.parametrize("program", [tokenize_pairs, write_pairs])
def test_weights_are_refused(program, written, step_records) -> None:
    records = [{**record, "weight": 0.5} for record in step_records(1, 2)]
    with pytest.raises(StepDPOError, match=r"'weight' is 0\.5, and other trainers weigh all pairs alike"):
        written(program, records)
