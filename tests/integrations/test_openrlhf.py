"""OpenRLHF's DPO command on the CPU, with and without packed forests. `make openrlhf` makes an environment for it.

Its command line, data set, Actor, trainer and loss are the real ones. DeepSpeed and flash-attn, which its modules
import and which want a GPU, are empty modules here, and the strategy, which is DeepSpeed's, is `OneProcess`.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf")

from stepdpo_kernels.model import padded_logps
from stepdpo_kernels.types import StepDPOError

# What OpenRLHF imports from packages that want a GPU; nothing of it is called in these tests.
_ABSENT: dict[str, tuple[str, ...]] = {
    "deepspeed": (),
    "flash_attn": (),
    "flash_attn.utils": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils.distributed": ("all_gather",),
}


@pytest.fixture(scope="module")
def openrlhf() -> Iterator[Any]:
    """Our module for OpenRLHF, imported beside the empty modules."""
    with pytest.MonkeyPatch.context() as patch:
        for name, members in _ABSENT.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(dict.fromkeys(members))
            patch.setitem(sys.modules, name, module)
        from stepdpo_kernels.integrations import openrlhf

        yield openrlhf
        for name in [name for name in sys.modules if name.partition(".")[0] == "openrlhf"]:
            del sys.modules[name]
        del sys.modules[openrlhf.__name__]


class OneProcess:
    """OpenRLHF's strategy on one CPU: the models as they are in float32, AdamW of torch; `logs` is what fit reports."""

    ring_attn_group = None
    accumulated_gradient = 1

    def __init__(self, args: Any) -> None:
        self.args = args
        self.logs: list[dict[str, float]] = []
        self.optimizer: Any = None

    def setup_distributed(self) -> None:
        torch.manual_seed(0)

    def get_ds_train_config(self) -> None:
        return None

    def get_ds_eval_config(self, offload: bool) -> None:
        return None

    def print(self, *args: Any) -> None:
        pass

    def is_rank_0(self) -> bool:
        return True

    def setup_dataloader(self, data: Any, size: int, pin: bool, shuffle: bool, collate: Any, **options: Any) -> Any:
        return torch.utils.data.DataLoader(data, size, shuffle=False, collate_fn=collate)

    def prepare(self, trained: Any, reference: Any) -> Any:
        model, config = trained
        parameters = [p for p in model.float().parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=config["adam"]["lr"])
        scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        return (model, self.optimizer, scheduler), reference.float()

    def backward(self, loss: Any, model: Any, optimizer: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def all_reduce(self, logs: dict[str, float]) -> dict[str, float]:
        self.logs.append(dict(logs))
        return logs

    def save_model(self, model: Any, tokenizer: Any, folder: str) -> None:
        self.trained = model


Command = Callable[..., OneProcess]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples/openrlhf"


@pytest.fixture
def command(openrlhf, tmp_path, monkeypatch, tiny_model, tiny_tokenizer, step_records) -> Command:
    """command(*options, packed=...): runs the command on a tiny model, and returns the strategy that it used."""
    tokenizer = tiny_tokenizer("qwen2")
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = []
    for number, record in enumerate(step_records(2, 4)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        steps = {"prompt": prompt + record["initial_reason_steps"], "rejected": record["rejected"]}
        lines.append(json.dumps(steps | {"chosen": record["chosen"] + " So far so good." * (number % 3)}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    used: list[OneProcess] = []

    def get_strategy(args: Any) -> OneProcess:
        used.append(OneProcess(args))
        return used[-1]

    monkeypatch.setattr("openrlhf.utils.get_strategy", get_strategy)
    common = {
        "--model.model_name_or_path": str(tmp_path / "model"),
        "--data.dataset": str(tmp_path / "pairs.jsonl"),
        "--data.prompt_key": "prompt",
        "--data.max_len": "512",
        "--ds.attn_implementation": "sdpa",
        "--ckpt.output_dir": str(tmp_path / "out"),
        "--train.micro_batch_size": "4",
        "--train.batch_size": "4",
        "--train.max_epochs": "2",
        "--model.beta": "0.4",
        "--adam.lr": "3e-4",
    }

    def run(*options: str, packed: bool) -> OneProcess:
        arguments = [word for pair in common.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["train_dpo", *arguments, *options])
        if packed:
            openrlhf.main()
        else:
            runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")
        return used[-1]

    return run


@pytest.fixture
def forests(openrlhf, monkeypatch) -> list[Any]:
    """Grows by the forest of every pass over one."""
    from stepdpo_kernels.integrations import forest_forward

    seen: list[Any] = []

    def watched(model, forest, **options):
        seen.append(forest)
        return padded_logps(model, forest, **options)

    monkeypatch.setattr(forest_forward, "padded_logps", watched)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--model.nll_loss_coef", "0.2"),
        ("--model.ipo_enable",),
        ("--ds.lora.rank", "4"),
        ("--model.gradient_checkpointing_enable",),
    ],
    ids=["sigmoid", "nll", "ipo", "lora", "checkpointing"],
)
def test_training_is_plain_training(command: Command, forests: list[Any], options: tuple[str, ...]) -> None:
    plain = command(*options, packed=False).logs
    assert not forests
    packed = command(*options, packed=True).logs
    assert len(plain) == 4
    assert plain[0]["loss"] != pytest.approx(plain[3]["loss"], rel=0.01)
    for name in {"loss", "acc", "nll_loss"} & plain[0].keys():
        assert [log[name] for log in packed] == pytest.approx([log[name] for log in plain], rel=1e-5, abs=1e-5)
    for name in ("chosen_reward", "reject_reward"):
        assert [log[name] for log in packed] == pytest.approx([log[name] for log in plain], rel=1e-3, abs=1e-4)
    assert len(forests) == 8
    assert forests[0] is forests[1]  # packed once for policy and reference
    assert all(forest.batch.num_tokens < forest.batch.tokens_unshared / 1.5 for forest in forests)


def test_the_end_of_a_step_is_dropped(command: Command, forests: list[Any], tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer("qwen2")
    ends: list[set[str]] = []
    for end in ("keep", "drop"):
        forests.clear()
        command("--stepdpo.end_of_step", end, packed=True)
        batch = forests[0].batch
        rows = batch.branches.index.split(batch.branches.lengths.tolist())
        ends.append({tokenizer.decode(batch.targets[row])[-12:] for row in rows})
        assert all(tokenizer.decode(batch.targets[row]).startswith(" ") for row in rows)  # all of the step
    kept, dropped = ends
    assert all(text.endswith(". <|im_end|>") for text in kept)
    assert all(text.endswith((" apples.", "far so good.")) for text in dropped)


def make_trainer(command: Command, monkeypatch) -> Any:
    """The trainer of the command, before it trains."""
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    found: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "fit", lambda self, *args, **options: found.append(self))
        command(packed=False)
    return found[0]


def test_removing_restores_the_trainer(command: Command, openrlhf, monkeypatch) -> None:
    trainer = make_trainer(command, monkeypatch)
    lms = [trainer.model.model, trainer.ref_model.model]
    state = [dict(vars(x)) for x in (trainer, *lms, *(lm.config for lm in lms))]
    *batch, lengths = next(iter(trainer.train_dataloader))
    batch = [tensor.squeeze(1) for tensor in batch]

    def forward() -> list[torch.Tensor]:
        with torch.no_grad():
            chosen, rejected, _, nll = trainer.concatenated_forward(trainer.model, *batch, lengths)
        return [chosen, rejected, nll]

    plain = forward()
    with openrlhf.accelerate_dpo(trainer):
        torch.testing.assert_close(forward(), plain)
        with pytest.raises(StepDPOError, match="already"):
            openrlhf.accelerate_dpo(trainer)
    assert state == [dict(vars(x)) for x in (trainer, *lms, *(lm.config for lm in lms))]
    assert all(torch.equal(a, b) for a, b in zip(forward(), plain, strict=True))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda trainer: setattr(trainer, "aux_loss", True), "aux_loss_coef"),
        (lambda trainer: setattr(trainer.args.ds, "ring_attn_size", 2), "ring_attn_size is 2"),
        (lambda trainer: setattr(trainer.model, "temperature", 0.7), "temperature of an Actor is 0\\.7"),
        (lambda trainer: setattr(trainer.ref_model.model.config, "attention_dropout", 0.1), "attention_dropout"),
    ],
    ids=["aux", "ring", "temperature", "dropout"],
)
def test_what_is_refused(command: Command, openrlhf, monkeypatch, break_it, said) -> None:
    trainer = make_trainer(command, monkeypatch)
    break_it(trainer)
    with pytest.raises(StepDPOError, match=said):
        openrlhf.accelerate_dpo(trainer)
    assert "forward" not in vars(trainer.model.model)


def test_other_trainers_and_ends_are_refused(openrlhf) -> None:
    with pytest.raises(StepDPOError, match="OpenRLHF's DPOTrainer"):
        openrlhf.accelerate_dpo(object())
    with pytest.raises(ValueError, match="keep, drop"):
        openrlhf.accelerate_dpo(object(), end_of_step="no")


def test_the_options_of_the_example_are_known(command: Command, forests: list[Any]) -> None:
    script = (EXAMPLES / "step_dpo.sh").read_text()
    words = script.partition("integrations.openrlhf")[2].replace("\\\n", " ").split()
    words.remove("--model.gradient_checkpointing_enable")  # which has no value
    ours = {"--model.model_name_or_path", "--data.dataset", "--ckpt.output_dir", "--train.batch_size"}
    options = [word for pair in zip(words[::2], words[1::2], strict=True) if pair[0] not in ours for word in pair]
    strategy = command(*options, "--model.gradient_checkpointing_enable", packed=True)
    assert strategy.args.ds.zero_stage == 3
    assert forests
