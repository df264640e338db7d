"""Weights sharded over processes, by FSDP2 and by DeepSpeed's ZeRO, against one process: losses, weights, resuming."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from stepdpo_kernels.model import enable_packed_forward
from stepdpo_kernels.trainer.reference import weights_fingerprint
from stepdpo_kernels.trainer.sharding import reshard
from tests.conftest import ROOT
from tests.families import FAMILIES
from tests.trainer.training import assert_same_weights, entries, weights, write_jsonl

EXAMPLES = ROOT / "examples" / "accelerate"
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
SHARDS = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
LIMIT = 300  # seconds
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero(stage: int) -> dict[str, Any]:
    settings = json.loads((EXAMPLES / "zero3.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    return {"deepspeed": settings}


class Run:
    """What a run left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def history(self) -> list[dict[str, Any]]:
        last = max(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        return json.loads((last / "trainer_state.json").read_text())["log_history"]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        if (self.folder / "adapter_model.safetensors").exists():
            from safetensors.torch import load_file

            return load_file(self.folder / "adapter_model.safetensors")
        return weights(AutoModelForCausalLM.from_pretrained(self.folder))


@pytest.fixture
def train(tiny_model, tiny_tokenizer, step_records, tmp_path) -> Callable[..., Run]:
    """train(name, command, **config): 21 pairs in steps of 4, so that the last step of an epoch has one pair."""
    for tied in (False, True):
        tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / f"model_{tied}")
        tiny_tokenizer().save_pretrained(tmp_path / f"model_{tied}")
    records = step_records(6, 4)[:21]
    for number, record in enumerate(records):
        record["weight"] = (1.0, 0.5, 2.0)[number % 3]
    held_out = write_jsonl(tmp_path / "eval.jsonl", step_records(1, 5, seed=3))

    def run(
        name: str,
        command: tuple[str, ...] = (),
        *,
        pairs: int = 21,
        tied: bool = False,
        fails: bool = False,
        **settings: Any,
    ) -> Any:
        data = write_jsonl(tmp_path / f"data_{pairs}.jsonl", records[:pairs])
        options = {key: settings.pop(key, None) for key in ("lora", "resume", "ref_model", "evaluate_first")}
        config = {
            "output_dir": str(tmp_path / name),
            "reference_cache_dir": str(tmp_path / f"cache_{name}"),
            "eval_strategy": "epoch",
            "per_device_eval_batch_size": 2,
            "pairs_per_step": 4,
            "max_tokens_per_batch": 130,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "save_steps": 4,
            "disable_tqdm": True,
            **settings,
        }
        described = {"model": str(tmp_path / f"model_{tied}"), "data": str(data), "eval_data": str(held_out)}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**described, **options, "config": config}))
        process = subprocess.Popen(
            [sys.executable, *command, str(ROOT / "tests" / "trainer" / "sharded_worker.py"), str(file)],
            cwd=ROOT,
            env={
                **os.environ,
                "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, said = process.communicate(timeout=LIMIT)
        finally:
            process.terminate()  # the launcher ends its processes with it, which may wait for one another
            process.wait()
        assert (process.returncode != 0) == fails, said
        return said if fails else Run(tmp_path / name)

    return run


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.stack([(a[name] - b[name]).norm() for name in a]).norm())


def assert_as_one(run: Run, one: Run, start: dict[str, torch.Tensor]) -> None:
    """The same entries of the log, to rounding, first margins of exactly 0, and the same model."""
    assert len(run.history) == len(one.history)
    for a, b in zip(one.history, run.history, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if "per_second" not in name and "runtime" not in name and "tokens" not in name:
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=5e-6), name
    # Before the first update: the learning rate warms up from 0.
    assert [run.history[step]["rewards/margins"] for step in (0, 1)] == [0.0, 0.0]
    assert distance(run.weights, one.weights) < 2e-5 * distance(one.weights, start)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("options", [{"reference": "adapter_off", "lora": LORA}, {"reference": "model"}], ids=str)
def test_a_reference_that_every_step_asks(train, tiny_model, sharding, options):
    """In two processes as in one, also a copy of the model, and margins of 0 before the first update."""
    one = train("one", **options)
    two = train("two", (*TORCHRUN, "2"), **options, **sharding)
    start = weights(tiny_model()) if "lora" not in options else {n: torch.zeros_like(w) for n, w in one.weights.items()}
    assert_as_one(two, one, start)


def start_of(tiny_model: Callable[..., Any], **options: Any) -> dict[str, torch.Tensor]:
    return weights(tiny_model(**options))


def resume_without_the_cache(
    train: Callable[..., Run], run: Run, tmp_path: Path, *arguments: Any, **options: Any
) -> None:
    """From the middle of the second epoch, computing reference log-probs again before the checkpoint is loaded."""
    before = run.weights
    shutil.rmtree(tmp_path / f"cache_{run.folder.name}")
    again = train(run.folder.name, *arguments, resume=str(run.folder / "checkpoint-8"), **options)
    assert_same_weights(again.weights, before)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [FSDP2, SHARDS], ids=["whole", "shards"])
def test_fsdp2_trains_as_one_process_and_resumes(train, tiny_model, tmp_path, sharding):
    one, two = train("one"), train("two", (*TORCHRUN, "2"), **sharding)
    assert_as_one(two, one, start_of(tiny_model))
    saved = entries(two.folder / "checkpoint-12")
    assert ("pytorch_model_fsdp_0" in saved) == (sharding is SHARDS)  # and not DistributedDataParallel's
    assert ("pytorch_model_fsdp.bin" in saved) == (sharding is FSDP2)
    assert entries(two.folder) == entries(one.folder)
    resume_without_the_cache(train, two, tmp_path, (*TORCHRUN, "2"), **sharding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"tied": True},
        {"gradient_checkpointing": True},
        {"ref_model": True, "verify_first_batch": True},
    ],
    ids="-".join,
)
def test_fsdp2_with_what_people_use(train, tiny_model, options):
    one, two = train("one", **options), train("two", (*TORCHRUN, "2"), **options, **FSDP2)
    assert_as_one(two, one, start_of(tiny_model, tie_word_embeddings=options.get("tied", False)))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [FSDP2, pytest.param(zero(3), marks=needs_deepspeed)], ids=["fsdp2", "zero3"])
def test_an_adapter_over_a_sharded_model(train, sharding):
    one = train("one", lora=LORA, learning_rate=1e-2)
    two = train("two", (*TORCHRUN, "2"), lora=LORA, learning_rate=1e-2, **sharding)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in one.weights.items()}
    assert_as_one(two, one, nothing)
    assert "model.safetensors" not in entries(two.folder)


@pytest.mark.slow
def test_log_probs_stay_float32_under_fsdp2_in_bfloat16(train):
    one, two = train("one", bf16=True), train("two", (*TORCHRUN, "2"), bf16=True, **FSDP2)
    assert [two.history[step]["rewards/margins"] for step in (0, 1)] == [0.0, 0.0]
    for a, b in zip(one.history, two.history, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], abs=0.05)
            means = torch.tensor(b["logps/chosen"])  # float32 has bits that bfloat16 lacks
            assert means.bfloat16().float() != means


@pytest.mark.slow
def test_references_of_other_bits_are_not_read(train, tmp_path):
    """FSDP2 casts also what autocast leaves in float32."""
    cache = {"reference_cache_dir": str(tmp_path / "cache"), "bf16": True, "max_steps": 4}
    for name, sharding in (("ddp", {}), ("fsdp2", FSDP2)):
        run = train(name, (*TORCHRUN, "2"), **cache, **sharding)
        assert run.history[0]["rewards/margins"] == 0.0
    assert len(entries(tmp_path / "cache")) == 4  # of two datasets


@pytest.mark.slow
def test_steps_with_fewer_pairs_than_processes(train, tiny_model):
    options = {"pairs": 7, "pairs_per_step": 6, "save_steps": 2}
    one, three = train("one", **options), train("three", (*TORCHRUN, "3"), **options, **FSDP2)
    assert_as_one(three, one, start_of(tiny_model))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_and_resumes(train, tiny_model, tmp_path, stage):
    one, two = train("one"), train("two", (*TORCHRUN, "2"), **zero(stage))
    assert_as_one(two, one, start_of(tiny_model))
    assert (two.folder / "checkpoint-12" / "latest").read_text() == "global_step12"
    resume_without_the_cache(train, two, tmp_path, (*TORCHRUN, "2"), **zero(stage))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("option", ["tied", "gradient_checkpointing", "ref_model"])
def test_zero3_with_what_people_use(train, tiny_model, option):
    options = {option: True}
    one, two = train("one", **options), train("two", (*TORCHRUN, "2"), **options, **zero(3))
    assert_as_one(two, one, start_of(tiny_model, tie_word_embeddings=options.get("tied", False)))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2.yaml", pytest.param("zero3.yaml", marks=needs_deepspeed)])
def test_accelerate_launch_with_the_example(train, tiny_model, file):
    """As the example says but for the number of processes and, on CPUs, the precision."""
    command = (*LAUNCH, str(EXAMPLES / file), "--num_processes", "2", "--mixed_precision", "no")
    assert_as_one(train("two", command), train("one"), start_of(tiny_model))


@pytest.mark.slow
def test_evaluation_comes_after_sharding(train):
    said = train("two", (*TORCHRUN, "2"), evaluate_first=True, fails=True, **FSDP2)
    assert "evaluate: `train` shards the model" in said


@pytest.mark.gpu
@pytest.mark.parametrize("sharding", [FSDP2, pytest.param(zero(3), marks=needs_deepspeed)], ids=["fsdp2", "zero3"])
def test_on_gpus_in_bfloat16(train, sharding):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    count = str(min(2, torch.cuda.device_count()))
    one, run = train("one", bf16=True), train("run", (*TORCHRUN, count), bf16=True, **sharding)
    assert [run.history[step]["rewards/margins"] for step in (0, 1)] == [0.0, 0.0]
    for a, b in zip(one.history, run.history, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], abs=0.1)


# ---- without other processes ----------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone, in which FSDP2 shards as it does among many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_model_has_the_fingerprint_of_a_whole_one(one_process, tiny_model, lora):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def make() -> Any:
        model = tiny_model()
        if lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
        return model

    whole, sharded, other = make(), make(), make()
    for layer in (module for name, module in sharded.named_modules() if name.endswith(("layers.0", "layers.1"))):
        fully_shard(layer)
    fully_shard(sharded)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    next(other.parameters()).data.view(-1)[0] += 1.0
    for with_adapter in (False, True):
        prints = [weights_fingerprint(model, with_adapter=with_adapter) for model in (whole, sharded, other)]
        assert prints[0] == prints[1] != prints[2]
    if lora:
        plain = weights_fingerprint(whole, with_adapter=False)
        for name, p in sharded.named_parameters():
            if "lora_" in name:
                p.data.add_(1.0)
        assert weights_fingerprint(sharded, with_adapter=False) == plain
        assert weights_fingerprint(sharded) != weights_fingerprint(whole)


def test_a_forward_pass_without_backward_leaves_nothing_gathered(one_process, tiny_model, packed):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = tiny_model()
    enable_packed_forward(model)
    fully_shard(model, reshard_after_forward=False)
    with torch.no_grad():
        model(packed_batch=packed, head=lambda hidden, head: hidden)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    reshard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.fixture
def packed(pairs) -> Any:
    from stepdpo_kernels.packing import pack_pairs

    return pack_pairs(pairs[:2], max_tokens=250)[0]


def test_the_head_runs_in_the_forward_of_its_module(tiny_model, packed):
    """There FSDP2 and ZeRO-3 have gathered its weight."""
    model = tiny_model()
    enable_packed_forward(model)
    inside: list[bool] = []
    calls: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append("after"))

    def head(hidden: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
        inside.append(calls == ["before"])
        assert lm_head is model.lm_head
        return hidden

    model(packed_batch=packed, head=head)
    assert inside == [True]
    assert calls == ["before", "after"]
    with pytest.raises(ZeroDivisionError):
        model(packed_batch=packed, head=lambda hidden, lm_head: 1 / 0)
    assert "forward" not in vars(model.lm_head)
    assert model.lm_head(torch.zeros(1, model.config.hidden_size)).shape == (1, model.config.vocab_size)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_example_wraps_every_layer_of_every_supported_model(tiny_model, kind):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from yaml import safe_load

    example = safe_load((EXAMPLES / "fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=example["fsdp_version"], auto_wrap_policy=example["fsdp_auto_wrap_policy"].lower()
    )
    model = tiny_model(kind)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [wraps(layer) for layer in model.model.layers] == [True] * model.config.num_hidden_layers
    assert not wraps(model)


@pytest.mark.parametrize(("file", "distribution"), [("fsdp2.yaml", "FSDP"), ("zero3.yaml", "DEEPSPEED")])
def test_accelerate_reads_the_examples(file, distribution):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / file))
    assert config.distributed_type == distribution
    if distribution == "DEEPSPEED":
        settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == 3
        # pairs_per_step decides; any number here would be held against it
        assert {settings[name] for name in settings if "batch" in name or "steps" in name} == {"auto"}
