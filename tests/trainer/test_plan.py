"""`StepDPOTrainer.plan()`, `stepdpo train --dry_run`: what is promised is what training does; nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from benchmarks.plan import write_pairs
from stepdpo_kernels import StepDPOError, load_step_pairs
from stepdpo_kernels.cli import main
from stepdpo_kernels.packing import build_batch, epoch_order, pack_pairs, plan_ranks
from stepdpo_kernels.trainer import StepDPOTrainer, load_tokenizer
from stepdpo_kernels.trainer.memory import ModelSizes, plan_memory
from stepdpo_kernels.trainer.plan import sharding_of
from tests.trainer.training import entries, losses, watch, weights, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def test_a_reference_that_every_step_asks_is_said(pairs: Any, config: Callable[..., Any], tiny_model: Any) -> None:
    trainer = StepDPOTrainer(tiny_model(), config(reference="model"), pairs)
    plan = trainer.plan()
    assert plan.reference == {}
    assert "a second model, in every step" in str(plan)
    weights_of_it = sum(p.numel() * p.element_size() for p in tiny_model().parameters())
    assert plan.memory
    assert plan.memory.reference == pytest.approx(weights_of_it, rel=0.01)
    alone = StepDPOTrainer(tiny_model(), config(), pairs).plan().memory
    assert alone
    assert plan.memory.total - alone.total == plan.memory.reference


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_sampling_strategy": "grouped", "share": "pair", "pairs_per_step": 5, "num_train_epochs": 3},
        {"train_sampling_strategy": "sequential", "dataloader_drop_last": True, "pairs_per_step": 7},
        {"max_steps": 3, "warmup_steps": 2, "gradient_checkpointing": True, "reference": "none"},
    ],
    ids=["default", "grouped", "drop_last", "max_steps"],
)
def test_training_does_what_was_planned(
    settings: dict[str, Any], pairs: Any, config: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    args = config(**settings)
    trainer = StepDPOTrainer(tiny_model("qwen2"), args, pairs)
    plan = trainer.plan()
    seen = watch(trainer)
    passes: list[int] = []
    logps = trainer._logps
    trainer._logps = lambda model, batch: (passes.append(batch.num_pairs), logps(model, batch))[1]  # type: ignore[method-assign,func-returns-value]
    trainer.train()

    assert plan.steps == trainer.state.global_step
    assert plan.epochs == pytest.approx(args.num_train_epochs if args.max_steps < 0 else trainer.state.epoch)
    drawn = plan.steps_per_epoch * args.pairs_per_step if args.dataloader_drop_last else 24
    epoch, count = [], 0
    for batch, _, _ in seen:
        if count < drawn:
            epoch.append(batch)
            count += batch.num_pairs
    if args.max_steps < 0:
        assert count == drawn
        assert plan.epoch.batches == plan.epoch.most_batches == len(epoch)
        assert plan.epoch.tokens == sum(batch.num_tokens for batch in epoch)
        assert plan.epoch.unshared == sum(batch.tokens_unshared for batch in epoch)
        assert plan.epoch.rows == sum(batch.num_rows for batch in epoch)
        assert plan.epoch.largest_tokens == max(batch.num_tokens for batch in epoch)
        assert plan.epoch.largest_rows == max(batch.num_rows for batch in epoch)
        assert plan.epoch.largest_keys == max(batch.plan.keys.index.numel() for batch in epoch)
        assert plan.saved == 1 - plan.epoch.tokens / plan.epoch.unshared > 0
        assert plan.fill == plan.epoch.tokens / (plan.epoch.batches * args.max_tokens_per_batch) < 1
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    warming = min(plan.warmup_steps, len(rates) - 1)  # logged before a step is the rate that the step uses
    assert max(rates) == rates[warming] == plan.learning_rate == args.learning_rate
    assert plan.reference == ({} if args.reference == "none" else {"train": len(passes)})
    assert plan.memory == plan_memory(
        ModelSizes.of(trainer.model),
        max_tokens=plan.epoch.largest_tokens,
        max_rows=plan.epoch.largest_rows,
        compute=torch.float32,
        checkpointing="gradient_checkpointing" in settings,
    )


def test_a_plan_changes_nothing(pairs: Any, config: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    trajectories = []
    for planned in (False, True):
        torch.manual_seed(3)
        args = config(output_dir=f"{config().output_dir}-{planned}", num_train_epochs=2)
        trainer = StepDPOTrainer(tiny_model("qwen2"), args, pairs)
        state, before = torch.get_rng_state(), weights(trainer.model)
        if planned:
            assert trainer.plan() == trainer.plan()
            assert torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer.model).items())
        trainer.train()
        trajectories.append(losses(trainer))
    assert trajectories[0] == trajectories[1]


def test_where_the_reference_comes_from(
    pairs: Any, config: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    def trainer(**settings: Any) -> StepDPOTrainer:
        torch.manual_seed(0)
        return StepDPOTrainer(
            tiny_model("qwen2"), config(**settings), pairs, eval_dataset=[replace(p, id=f"{p.id} again") for p in pairs]
        )

    first = trainer()
    plan = first.plan()
    assert plan.evaluation is not None
    assert plan.evaluation.batches == len(pack_pairs(list(pairs), 250))
    assert plan.reference == {"train": plan.epoch.batches, "eval": plan.evaluation.batches}
    assert entries(tmp_path / "cache") == []
    assert f"train: {plan.epoch.batches} forward passes first; eval: {plan.evaluation.batches} " in str(plan)
    first.prepare_references()
    assert trainer().plan().reference == {"train": 0, "eval": 0}
    assert "train: cached; eval: cached" in str(trainer().plan())
    assert trainer(share="pair").plan().reference["train"] > 0


def test_a_plan_without_pairs_to_train_on(
    pairs: Any, config: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(StepDPOError, match="train_dataset is missing"):
        StepDPOTrainer(tiny_model("qwen2"), config(), eval_dataset=pairs).plan()


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any]) -> Path:
    folder = tmp_path / "model"
    tiny_model("qwen2").save_pretrained(folder)
    tiny_tokenizer("qwen2").save_pretrained(folder)
    return folder


def everything(folder: Path) -> dict[str, int]:
    """What lies under a folder, with the time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("by_file", [False, True])
def test_a_dry_run_prints_and_writes_nothing(
    by_file: bool,
    model_dir: Path,
    step_records: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = step_records(6, 4)
    bad = {**records[0], "rejected": records[0]["chosen"]}
    data = write_jsonl(tmp_path / "pairs.jsonl", [*records, bad])
    arguments = ["train", "--model", str(model_dir), "--data", str(data), "--output-dir", str(tmp_path / "a" / "run")]
    if by_file:
        (tmp_path / "config.yaml").write_text("dry_run: true\n")
        arguments += ["--config", str(tmp_path / "config.yaml")]
    else:
        arguments += ["--dry_run"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--pairs-per-step", "8", "--max-tokens-per-batch", "250", "--num-train-epochs", "2"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert everything(tmp_path) == before
    lines = {line[:16].strip(): line[16:] for line in output.splitlines()}
    assert lines["pairs"] == "24; left out: 1 identical branches"
    assert lines["optimiser steps"] == "3 an epoch of 8 pairs each, 6 in all (2 epochs)"
    assert lines["learning rate"] == "5e-07 at its peak after 1 warm-up steps, cosine schedule"
    passes = lines["forward passes"].split()[0]
    assert lines["reference"] == f"train: {passes} forward passes first"
    assert lines["memory"].startswith("about 0.0")
    assert f"{records[0]['prompt']}" in output
    assert " ┃ " in output  # the boundary
    assert output.endswith("dry run: nothing was trained or written\n")


def test_a_dry_run_says_what_training_would_refuse(
    model_dir: Path, step_records: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", step_records(2, 2))
    arguments = ["train", "--model", str(model_dir), "--data", str(data), "--dry_run"]
    with pytest.raises(SystemExit) as stop:  # a folder that holds a model
        main([*arguments, "--output_dir", str(model_dir)])
    assert stop.value.code == 2
    assert "holds a model: choose a new folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_two_processes(model_dir: Path, step_records: Callable[..., Any], tmp_path: Path) -> None:
    """Under torchrun: one of them prints what both take."""
    data = write_jsonl(tmp_path / "pairs.jsonl", step_records(6, 4)[:21])
    script = tmp_path / "train.py"
    script.write_text("import sys\nfrom stepdpo_kernels.cli import main\nmain(sys.argv[1:])\n")
    settings = {"pairs_per_step": 4, "max_tokens_per_batch": 130, "max_length": 500, "output_dir": tmp_path / "run"}
    before = everything(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)),
            *("train", "--dry_run", "--model", str(model_dir), "--data", str(data)),
            *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert everything(tmp_path) == before
    assert done.stdout.count("dry run: nothing was trained or written") == 1

    pairs = load_step_pairs(data, load_tokenizer(str(model_dir)))
    order = epoch_order(pairs, 42)
    steps = [[pairs[i] for i in order[at : at + 4]] for at in range(0, 21, 4)]
    ranks = [plan_ranks(step, 130, 2) for step in steps]  # by step, process and batch
    each = [sum(len(step[rank]) for step in ranks) for rank in range(2)]
    tokens = sum(
        build_batch(step, members, "tree").num_tokens
        for step, shares in zip(steps, ranks, strict=True)
        for share in shares
        for members in share
    )
    assert f"{sum(each)} an epoch, at most {max(each)} on one of 2 processes\n" in done.stdout
    assert f"\ntokens          {tokens:,} encoded an epoch" in done.stdout


# ---- load -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_thousand_pairs_in_a_gibibyte(model_dir: Path, tmp_path: Path) -> None:
    """Read, tokenised, checked and planned; the plan of the first steps is held against packing by hand."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs of Linux")

    def measured(number: int) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan", "--model", str(model_dir), "--pairs", str(number)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    small, large = measured(1000), measured(50_000)
    assert large["extra_bytes"] < 2**30, large
    assert large["plan"]["pairs"] == 50_000
    assert large["plan"]["steps"] == 391  # of 128

    data = tmp_path / "pairs.jsonl"
    write_pairs(data, 1000)
    pairs = load_step_pairs(data, load_tokenizer(str(model_dir)), max_length=None)
    assert max(Counter(pair.group for pair in pairs).values()) == 7
    order = epoch_order(pairs, 42)
    batches = [
        batch for at in range(0, 1000, 128) for batch in pack_pairs([pairs[i] for i in order[at : at + 128]], 8192)
    ]
    assert small["plan"] == {
        "pairs": 1000,
        "steps": 8,
        "batches": len(batches),
        "tokens": sum(batch.num_tokens for batch in batches),
        "unshared": sum(batch.tokens_unshared for batch in batches),
        "rows": sum(batch.num_rows for batch in batches),
    }


def test_a_model_whose_sizes_have_other_names(pairs: Any, config: Callable[..., Any]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = dict(
        n_embd=32, n_layer=2, n_head=4, vocab_size=512, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    plan = StepDPOTrainer(model, config(), pairs).plan()
    assert plan.memory is None
    assert "not estimated for this model" in str(plan)


@pytest.mark.parametrize(
    ("mode", "stage", "processes", "sharding"),
    [("NO", None, 1, "none"), ("MULTI_CPU", None, 2, "ddp"), ("FSDP", None, 2, "fsdp"), ("DEEPSPEED", 3, 2, "zero3")]
    + [("DEEPSPEED", stage, 2, None) for stage in (0, 1, 2)],
)
def test_how_memory_is_sharded(mode: str, stage: int | None, processes: int, sharding: str | None) -> None:
    """ZeRO-1 and 2 hold all weights in every process, and no formula here is theirs."""
    config = {} if not stage else {"zero_optimization": {"stage": stage}}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    accelerator = SimpleNamespace(distributed_type=DistributedType(mode), num_processes=processes, state=state)
    assert sharding_of(accelerator) == sharding
