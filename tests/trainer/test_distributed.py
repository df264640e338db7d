"""Two processes under torchrun (gloo, on the CPU) against one: the same losses, metrics and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_kernels.data import load_step_pairs
from tests.conftest import ROOT
from tests.trainer.training import assert_same_weights, entries, weights, write_jsonl

pytestmark = pytest.mark.slow
SCRIPT = "import sys\nfrom stepdpo_kernels.cli import main\nmain(sys.argv[1:])\n"


@pytest.fixture
def train(tiny_model, tiny_tokenizer, step_records, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """train(name, processes, **options): 21 pairs in steps of 4, so that the last step of an epoch has one pair."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    records = step_records(6, 4)[:21]
    for number, record in enumerate(records):
        record["weight"] = (1.0, 0.5, 2.0)[number % 3]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    held_out = write_jsonl(tmp_path / "eval.jsonl", step_records(1, 5, seed=3))
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(name: str, processes: int, **options: Any) -> subprocess.CompletedProcess[str]:
        settings = {
            "model": tmp_path / "model",
            "data": data,
            "eval_data": held_out,
            "eval_strategy": "epoch",
            "per_device_eval_batch_size": 2,
            "output_dir": tmp_path / name,
            "reference_cache_dir": tmp_path / "cache",
            "pairs_per_step": 4,
            "max_tokens_per_batch": 130,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "save_steps": 4,
            "disable_tqdm": True,
            **options,
        }
        if settings["eval_strategy"] == "no":
            del settings["eval_data"]
        return subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
                *(str(tmp_path / "train.py"), "train"),
                *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def history(run: Path) -> list[dict[str, Any]]:
    state = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())
    return state["log_history"]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([(a[name] - b[name]).norm() for name in a]).norm())


def test_two_processes_train_as_one(train, tiny_model, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        done = train(name, processes)
        assert done.returncode == 0, done.stderr
    assert entries(tmp_path / "one") == entries(tmp_path / "two")
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [e["step"] for e in one] == [e["step"] for e in two]
    assert sum("eval_loss" in e for e in two) == 1  # the second comes after the last checkpoint
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if "per_second" not in name and "runtime" not in name and "tokens" not in name:
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=5e-6), name
    # Before the first update (the learning rate warms up from 0) each process has margins of exactly 0.
    assert [two[step]["rewards/margins"] for step in (0, 1)] == [0.0, 0.0]
    trained = [weights(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("one", "two")]
    assert distance(*trained) < 2e-5 * distance(trained[0], weights(tiny_model()))

    # The cache serves the same processes again, and the first margins stay 0.
    done = train("again", 2)
    assert done.returncode == 0, done.stderr
    again = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert_same_weights(again, trained[1])

    # Resumed in the second epoch, in the same order as before.
    done = train("again", 2, resume_from_checkpoint=tmp_path / "again" / "checkpoint-8")
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), again)


def test_gradient_checkpointing_and_bfloat16_in_two_processes(train, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        done = train(name, processes, gradient_checkpointing=True, bf16=True)
        assert done.returncode == 0, done.stderr
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [two[step]["rewards/margins"] for step in (0, 1)] == [0.0, 0.0]
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], abs=0.02)


def test_what_one_process_refuses_two_refuse_too(train, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    done = train("used", 2)
    assert done.returncode != 0
    assert "holds a model: choose a new folder" in done.stderr
    assert entries(tmp_path / "used") == ["config.json"]
    done = train("odd", 2, pairs_per_step=5)
    assert done.returncode != 0
    assert "pairs_per_step must be a positive multiple of the 2 processes, got 5" in done.stderr
    assert not (tmp_path / "odd").exists()


def test_what_is_not_finite_on_one_process_is_skipped_by_both(train, tiny_model, tmp_path):
    """The embedding of a token that few pairs have is infinite; the process that draws one of them names it."""
    pairs = load_step_pairs(tmp_path / "data.jsonl", AutoTokenizer.from_pretrained(tmp_path / "model"))
    having: dict[int, list[str]] = {}
    for pair in pairs:
        for token in {*pair.prefix_ids.tolist(), *pair.chosen_ids[:-1].tolist(), *pair.rejected_ids[:-1].tolist()}:
            having.setdefault(token, []).append(pair.id)
    token, some = min(having.items(), key=lambda item: len(item[1]))
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")
    model.save_pretrained(tmp_path / "model")
    skips = []
    for name, processes in (("one", 1), ("two", 2)):
        done = train(name, processes, reference="none", on_nonfinite="skip", eval_strategy="no")
        assert done.returncode == 0, done.stderr
        assert all(repr(id_) in done.stderr for id_ in some)
        assert "every loss is finite" not in done.stderr  # pairs of the other process are not to blame
        skips.append(done.stderr.count("this step is skipped"))
    assert skips[1] == 2 * skips[0]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [e["step"] for e in one if "steps/skipped" in e] == [e["step"] for e in two if "steps/skipped" in e]
    losses = [[e["loss"] for e in run if "loss" in e] for run in (one, two)]
    assert 0 < len(losses[0]) < len(one)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    done = train("stopped", 2, reference="none", eval_strategy="no")
    assert done.returncode != 0
    assert "not finite: the log-probs of pair" in done.stderr
