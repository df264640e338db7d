"""`stepdpo train`: options from a YAML file and the command line, what a run leaves, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_kernels.cli import main
from stepdpo_kernels.cli.train import parse
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import assert_same_weights, entries, weights, write_jsonl


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


REQUIRED = ["--model", "m", "--data", "d", "--output-dir", "o"]


@pytest.fixture
def yaml_file(tmp_path) -> Callable[[Any], str]:
    def write(values: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return str(path)

    return write


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_command_line_alone():
    options, config = parse([*REQUIRED, "--beta", "0.2", "--share=pair", "--strict", "--pairs_per_step", "6"])
    assert (options.model, options.data, options.strict, options.max_length) == ("m", "d", True, 1024)
    assert (config.output_dir, config.beta, config.share, config.pairs_per_step) == ("o", 0.2, "pair", 6)


@pytest.mark.parametrize("dash", ["_", "-"])
def test_names_are_written_with_dashes_or_underscores(dash, yaml_file):
    name = "max_tokens_per_batch".replace("_", dash)
    assert parse([*REQUIRED, f"--{name}", "77"])[1].max_tokens_per_batch == 77
    assert parse([*REQUIRED, "--config", yaml_file({name: 77})])[1].max_tokens_per_batch == 77


def test_a_file_gives_options_and_the_command_line_overrides_them(yaml_file):
    file = yaml_file(
        """
        model: from-file
        data: pairs.jsonl
        output_dir: out
        beta: 0.1
        learning_rate: 5e-7   # YAML reads this as text
        strict: true
        bf16: false
        limit: null
        warmup_steps: 0.05
        share: pair
        report_to: [tensorboard]
        lr_scheduler_kwargs: {num_cycles: 0.3}
        """
    )
    options, config = parse(["--config", file])
    assert (options.model, options.strict, options.limit) == ("from-file", True, None)
    assert (config.beta, config.learning_rate, config.bf16, config.share) == (0.1, 5e-7, False, "pair")
    assert config.warmup_steps == 0.05
    assert config.report_to == ["tensorboard"]
    assert config.lr_scheduler_kwargs == {"num_cycles": 0.3}
    for arguments in (
        ["--beta", "0.3", "--config", file],
        ["--config", file, "--beta", "0.3"],
        [f"--config={file}", "--beta=0.3"],
    ):
        options, config = parse([*arguments, "--strict", "false", "--model", "other", "--report_to", "none"])
        assert (options.model, options.data, options.strict) == ("other", "pairs.jsonl", False)
        assert (config.beta, config.share, config.report_to) == (0.3, "pair", [])


def test_several_losses(yaml_file):
    file = yaml_file({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2]})
    for arguments in (["--config", file], ["--loss_type", "sigmoid", "sft", "--loss-weights", "1", "0.2"]):
        config = parse([*REQUIRED, *arguments])[1]
        assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])
        assert config.build_loss().mixture == {"sigmoid": 1.0, "sft": 0.2}
    for arguments in (["--config", yaml_file({"loss_type": "hinge"})], ["--loss_type", "hinge"], ["--loss-type=hinge"]):
        assert parse([*REQUIRED, *arguments])[1].loss_type == "hinge"
    assert parse(REQUIRED)[1].loss_type == "sigmoid"
    assert parse(["--config", file, *REQUIRED, "--loss_type", "ipo", "hinge"])[1].loss_type == ["ipo", "hinge"]
    with pytest.raises(StepDPOError, match=r"--loss_weights.*: invalid float value: 'x'"):
        parse([*REQUIRED, "--loss_weights", "x"])


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", None), ("False", None), ("checkpoint-3", "checkpoint-3")]
)
def test_what_to_resume_from(text, value, yaml_file):
    from stepdpo_kernels.cli.train import _resume

    for arguments in (["--resume_from_checkpoint", text], ["--config", yaml_file(f"resume_from_checkpoint: {text}")]):
        assert _resume(parse([*REQUIRED, *arguments])[1].resume_from_checkpoint) is value or value == text
    assert _resume(parse(REQUIRED)[1].resume_from_checkpoint) is None


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "--model",
        "--data",
        "--output_dir",
        "--config",
        "--beta",
        "--max_tokens_per_batch",
        "--learning_rate",
    ):
        assert name in text
    assert "Token budget of one forward pass" in text


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_model, tiny_tokenizer, step_records, tmp_path) -> Callable[..., list[str]]:
    """arguments(output_dir, **options): `train` on 24 pairs in tmp_path, two epochs of steps of four pairs."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", step_records(6, 4))

    def make(output_dir: str, **options: Any) -> list[str]:
        settings = {
            "model": tmp_path / "model",
            "data": data,
            "output_dir": tmp_path / output_dir,
            "reference_cache_dir": tmp_path / "cache",
            "pairs_per_step": 4,
            "max_tokens_per_batch": 250,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "disable_tqdm": True,
            **options,
        }
        return ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]

    return make


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0


def test_a_run_reports_what_was_left_out_and_leaves_a_plain_model(arguments, tiny_model, tmp_path, capsys):
    run(arguments("run", max_length=95, bf16=True))
    out = capsys.readouterr().out
    assert "data.jsonl: 24 records, 23 kept; 1 left out as too_long: data.jsonl, line 7" in out
    assert f"trained 12 steps on 23 pairs; the model is in {tmp_path / 'run'}" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    AutoTokenizer.from_pretrained(tmp_path / "run")
    first = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"][0]
    assert first["rewards/margins"] == 0.0


def test_evaluation_pairs_limit_and_tokenizer(arguments, step_records, tmp_path, capsys):
    held_out = write_jsonl(tmp_path / "eval.jsonl", step_records(1, 3, seed=4))
    run(
        arguments(
            "run",
            eval_data=held_out,
            eval_strategy="steps",
            eval_steps=1,
            limit=8,
            tokenizer=tmp_path / "model",
            num_train_epochs=1,
        )
    )
    assert "trained 2 steps on 8 pairs" in capsys.readouterr().out
    history = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in history) == 2


def test_whole_solutions(arguments, step_records, tmp_path, capsys):
    records = step_records(2, 4)
    records[1]["full_rejected"] = ""
    data = write_jsonl(tmp_path / "solutions.jsonl", records)
    run(arguments("run", data=data, eval_data=data, eval_strategy="epoch", unit="solution", num_train_epochs=1))
    out = capsys.readouterr().out
    assert out.count("8 records, 7 kept; 1 left out as empty_branch: solutions.jsonl, line 2") == 2
    assert "trained 2 steps on 7 pairs" in out
    logs = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    steps = [entry["logps/chosen"] for entry in logs if "logps/chosen" in entry]
    assert max(steps) < -200  # of whole solutions, about 60 tokens over 512


def test_a_run_can_be_repeated_resumed_and_gives_the_same(arguments, tmp_path, capsys):
    run(arguments("one"))
    run(arguments("two"))
    capsys.readouterr()
    same = {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.safetensors")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").glob("*.safetensors")} == same
    with pytest.raises(SystemExit) as exit_:
        main(arguments("one"))
    assert exit_.value.code == 2
    assert "holds another run" in capsys.readouterr().err
    # The finished run's last checkpoint is at the end: nothing is left to train, and the model is the same.
    run(arguments("one", resume_from_checkpoint="true"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.safetensors")} == same


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(arguments, tmp_path, capsys, monkeypatch):
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for place in ("data.load_step_pairs", "trainer.load_model", "trainer.StepDPOTrainer.training_step"):
        with monkeypatch.context() as patch:
            name = place.rpartition(".")[2]
            if place.count(".") == 1:
                patch.setattr(f"stepdpo_kernels.cli.train.{name}", interrupted)
            else:
                patch.setattr(f"stepdpo_kernels.{place}", interrupted)
            with pytest.raises(SystemExit) as exit_:
                main(arguments("deep/run"))
        assert exit_.value.code == 130
        assert "interrupted before the first checkpoint" in capsys.readouterr().err
        assert not (tmp_path / "deep").exists()
    run(arguments("deep/run"))


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("options", [{}, {"reference": "adapter_off", "bf16": True}], ids=str)
def test_an_adapter_and_what_it_is_merged_into(arguments, tiny_model, tmp_path, capsys, options):
    """PEFT loads the adapter, and the merged model computes what model and adapter do."""
    from peft import PeftModel

    given = {"lora_r": 4, "lora_alpha": 16, "learning_rate": 1e-2, "merge_adapter": True, **options}
    run(arguments("run", **given))
    assert f"the model with its adapter merged is in {tmp_path / 'run' / 'merged'}" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 16)
    assert {name.rpartition(".")[2] for name in adapter["target_modules"]} == LINEAR
    adapted = PeftModel.from_pretrained(tiny_model(), tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain, one, other = (model(tokens).logits for model in (tiny_model(), adapted, merged))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, plain, rtol=1e-2)


def test_layers_of_an_adapter(arguments, tmp_path):
    run([*arguments("run", lora_r=2, max_steps=1), "--lora_target_modules", "q_proj", "v_proj"])
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (sorted(adapter["target_modules"]), adapter["lora_alpha"]) == (["q_proj", "v_proj"], 4)


def test_an_adapter_on_four_bits(arguments, tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = arguments("run", lora_r=2, max_steps=2, load_in_4bit=True, merge_adapter=True)
    tiny_model(intermediate_size=128).save_pretrained(tmp_path / "model")
    run(settings)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_a_reference_of_its_own(arguments, tiny_model, tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "reference")
    for mode in ("precomputed", "model"):
        run(arguments(f"with_{mode}", ref_model=tmp_path / "reference", reference=mode, num_train_epochs=1))
    runs = (tmp_path / f"with_{mode}" / "checkpoint-6" for mode in ("precomputed", "model"))
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in runs]
    once, every_step = ([entry["loss"] for entry in state["log_history"]] for state in states)
    assert once == every_step
    assert abs(once[0] - 0.6931) > 1e-3


def test_an_adapter_that_cannot_be_merged_is_refused_before_training(arguments, tiny_model, tmp_path, capsys):
    settings = [*arguments("run", lora_r=2, merge_adapter=True), "--lora_target_modules", "embed_tokens", "q_proj"]
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        main(settings)
    assert exit_.value.code == 2
    assert "merge_adapter: the embeddings are also the head's weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["load_in_4bit", "merge_adapter"])
def test_what_needs_an_adapter(option):
    with pytest.raises(StepDPOError, match=f"{option} needs an adapter: give lora_r"):
        parse([*REQUIRED, f"--{option}"])


def test_layers_of_no_adapter():
    with pytest.raises(StepDPOError, match="lora_target_modules needs an adapter: give lora_r"):
        parse([*REQUIRED, "--lora_target_modules", "q_proj"])


def test_pairs_that_nobody_would_evaluate_on():
    with pytest.raises(StepDPOError, match="eval_data needs eval_strategy"):
        parse([*REQUIRED, "--eval_data", "held_out"])
    options, config = parse([*REQUIRED, "--eval_data", "held_out", "--eval_on_start"])
    assert (options.eval_data, config.eval_on_start) == ("held_out", True)


@pytest.mark.slow
def test_one_of_several_processes_speaks(arguments, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command = [sys.executable, "-c", "from stepdpo_kernels.cli import main; main()"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [*launcher, *command, *arguments("run", max_steps=1)], capture_output=True, text=True, env=env, timeout=200
    )
    assert said.returncode == 0, said.stderr
    assert [said.stdout.count(words) for words in (" kept", "trained 1 steps", "what came of it")] == [1, 1, 1]


# ---- a process of its own -------------------------------------------------------------------------------------------


# Steps that take a while, so that a signal arrives before the run is over, on a fast machine, too. What a shell
# starts in the background ignores interrupts, and so would its children.
UNHURRIED = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)
from stepdpo_kernels.cli import main
from stepdpo_kernels.trainer import StepDPOTrainer
step = StepDPOTrainer.training_step
def slow_step(*args, **options):
    time.sleep(0.05)
    return step(*args, **options)
StepDPOTrainer.training_step = slow_step
main()
"""


def start(arguments: list[str], folder: Path, code: str = UNHURRIED, **pipes: Any) -> subprocess.Popen[str]:
    """On one thread, as the tests are, so that results compare bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        **({"stdout": (folder / "stdout").open("w")} | pipes),
        stderr=(folder / "stderr").open("w"),
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_leaves_a_checkpoint_that_loads_and_goes_on(arguments, tmp_path):
    options = {"num_train_epochs": 24, "save_total_limit": 2}  # 144 steps
    process = start(arguments("run", **options), tmp_path)
    try:
        wait_for(tmp_path / "run" / "checkpoint-2", process)
        for _ in range(15):  # one that arrives within a destructor is lost
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=4)
                break
        assert process.returncode == 130
    finally:
        process.kill()
    said = (tmp_path / "stderr").read_text()
    left = entries(tmp_path / "run")
    assert "Traceback" not in said
    assert left[-1] == "stepdpo_run.json"
    assert all(name.startswith("checkpoint-") for name in left[:-1])
    last = max(left[:-1], key=lambda name: int(name.partition("-")[2]))
    assert last != "checkpoint-144"
    assert f"interrupted; the last checkpoint is {tmp_path / 'run' / last}" in said
    assert "continue with --resume_from_checkpoint true" in said
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / last)

    run(arguments("run", resume_from_checkpoint="true", **options))
    run(arguments("undisturbed", **options))
    resumed, undisturbed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run", "undisturbed"))
    assert_same_weights(weights(resumed), weights(undisturbed))


# Imports once, then runs each command line it is given in a child of its own, whose number it says first.
FORKS = (
    UNHURRIED.replace("\nmain()\n", "")
    + """
import json, os, sys
import stepdpo_kernels.cli.train
import stepdpo_kernels.trainer.reference
stepdpo_kernels.trainer.reference.SAVE_SECONDS = 0.0
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        main(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)


@pytest.fixture
def server(tmp_path) -> Iterator[subprocess.Popen[str]]:
    process = start([], tmp_path, FORKS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_twenty_random_moments(arguments, server, tmp_path, seed):
    """SIGKILL whenever: while reading, in the reference pass, in a step, while saving. The run gets there all the same.

    Checkpoints that are there can be loaded at every moment, and losses and weights are those of an undisturbed run.
    """
    options = {"num_train_epochs": 8, "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-4}  # 48 steps

    def run_in_child(name: str, **more: Any) -> int:
        cache = {"reference_cache_dir": tmp_path / f"cache_of_{name}"}
        server.stdin.write(json.dumps(arguments(name, **options, **cache, **more)) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    began = time.monotonic()
    run_in_child("undisturbed")
    wait_for(tmp_path / "undisturbed" / "stepdpo_run.json", server)
    start_up = time.monotonic() - began
    assert int(server.stdout.readline()) == 0
    training = time.monotonic() - began - start_up

    folder = tmp_path / "run"
    moments = random.Random(seed)
    reached = []
    for number in range(20):
        # as a user would: the same command again where nothing was begun, otherwise go on with what is there
        resume = {"resume_from_checkpoint": "true"} if (folder / "stepdpo_run.json").exists() else {}
        before = entries(folder)
        child = run_in_child("run", **resume)
        # on the way to the first new checkpoint, or some time after it
        deadline = time.monotonic() + (moments.uniform(0.0, start_up) if number % 2 else 60)
        while entries(folder) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        if not number % 2:
            time.sleep(moments.uniform(0.0, training / 16))
        os.kill(child, signal.SIGKILL)
        status = int(server.stdout.readline())
        assert status == -signal.SIGKILL, (status, (tmp_path / "stderr").read_text())
        steps = [int(name.partition("-")[2]) for name in entries(folder) if name.startswith("checkpoint-")]
        reached.append(max(steps, default=0))
        for step in steps:
            AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
    assert reached == sorted(reached)
    assert 0 < reached[-1] < 48
    run_in_child("run", resume_from_checkpoint="true")
    assert int(server.stdout.readline()) == 0, (tmp_path / "stderr").read_text()
    histories = [
        json.loads((tmp_path / name / "checkpoint-48" / "trainer_state.json").read_text())["log_history"]
        for name in ("run", "undisturbed")
    ]
    assert len(histories[0]) == 48
    for resumed, undisturbed in zip(*histories, strict=True):
        assert {n: v for n, v in resumed.items() if "per_second" not in n} == {
            n: v for n, v in undisturbed.items() if "per_second" not in n
        }
    resumed, undisturbed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run", "undisturbed"))
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert entries(folder) == entries(tmp_path / "undisturbed")
