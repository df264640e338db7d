"""LLaMA-Factory's own training, with and without packed forests. `make llama-factory` makes an environment for it."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llamafactory")

from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file

from examples.llama_factory import tokenize_pairs
from stepdpo_kernels.integrations import forest_forward, llama_factory
from stepdpo_kernels.model import forward, padded_logps
from stepdpo_kernels.types import StepDPOError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer, step_records) -> Path:
    """A model, and pairs whose two steps differ in length."""
    folder = tmp_path_factory.mktemp("llama_factory")
    torch.manual_seed(0)
    tiny_model("qwen2").save_pretrained(folder / "model")
    tiny_tokenizer("qwen2").save_pretrained(folder / "model")
    records = step_records(3, 4)
    for number, record in enumerate(records):
        record["chosen"] += " So far so good." * (number % 3)
    (folder / "step_pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    info = json.loads((ROOT / "examples/llama_factory/dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


class Run:
    """Training of LLaMA-Factory's in a folder; it reports `log_history`, and the weights that it saved."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output

    def arguments(self, **options: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(self.folder / "model"),
            "stage": "dpo",
            "do_train": True,
            "finetuning_type": "full",
            "dataset": "step_pairs",
            "dataset_dir": str(self.folder),
            "template": "qwen",
            "output_dir": str(self.output),
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-4,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "pref_beta": 0.4,
            "use_cpu": True,
        } | options

    def __call__(self, accelerated: bool, **options: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        arguments = self.arguments(output_dir=str(self.output / str(accelerated)), **options)
        if accelerated:
            self.command(arguments)
        else:
            run_exp(arguments)
        output = Path(arguments["output_dir"])
        weights = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
        return json.loads((output / "trainer_state.json").read_text())["log_history"], weights

    def command(self, arguments: dict[str, Any]) -> None:
        """As `python -m stepdpo_kernels.integrations.llama_factory train FILE.yaml` does."""
        self.output.mkdir(exist_ok=True)
        file = self.output / "arguments.yaml"
        file.write_text(json.dumps(arguments))  # which is YAML
        before, sys.argv = sys.argv, ["llama_factory", "train", str(file)]
        try:
            llama_factory.main()
        finally:
            sys.argv = before


@pytest.fixture
def run(folder, tmp_path, monkeypatch) -> Run:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return Run(folder, tmp_path / "out")


@pytest.fixture
def passes(monkeypatch) -> list[Any]:
    """Grows by the forest of every pass over one."""
    seen: list[Any] = []
    compute = padded_logps

    def watched(model, forest, **options):
        seen.append(forest)
        return compute(model, forest, **options)

    monkeypatch.setattr(forest_forward, "padded_logps", watched)
    return seen


@pytest.fixture
def make_trainer(run, monkeypatch):
    """make_trainer(**options): the trainer that LLaMA-Factory would train, before it does."""

    def make(**options: Any) -> Any:
        class StopError(Exception):
            pass

        def stop(self, *args, **kwargs):
            raise StopError(self)

        with monkeypatch.context() as patch:
            patch.setattr(dpo.CustomDPOTrainer, "train", stop)
            with pytest.raises(StopError) as stopped:
                run_exp(run.arguments(**options))
        return stopped.value.args[0]

    return make


def test_training_is_plain_training(run: Run, passes: list[Any], case: dict[str, Any]) -> None:
    plain, plain_weights = run(False, **case)
    assert not passes
    packed, packed_weights = run(True, **case)
    losses = [[entry[name] for entry in log for name in entry if name in LOSSES] for log in (plain, packed)]
    assert len(losses[0]) >= 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)
    for before, after in zip(plain, packed, strict=True):
        assert before.keys() == after.keys()
        close = [name for name in before if "rewards" in name or "logps" in name or "grad_norm" in name]
        assert [after[n] for n in close] == pytest.approx([before[n] for n in close], rel=1e-3, abs=1e-3)
    assert packed_weights.keys() == plain_weights.keys()
    assert passes
    assert all(forest.batch.num_tokens < forest.batch.tokens_unshared / 1.5 for forest in passes)


LOSSES = ("loss", "eval_loss", "sft_loss", "odds_ratio_loss")
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"pref_loss": "ipo"},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "sft": {"pref_ftx": 0.5},
    "ld": {"ld_alpha": 0.3},
    "bco": {"pref_bco_weight": 0.5},
    "smoothing": {"dpo_label_smoothing": 0.1},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "no checkpointing": {"disable_gradient_checkpointing": True},
    "workers": {"dataloader_num_workers": 1},
    "evaluation": {"val_size": 0.34, "do_eval": True, "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 3},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES.values(), ids=CASES)


def test_reference_model_of_its_own(run: Run, folder: Path, tiny_model) -> None:
    reference = tiny_model("qwen2")
    for parameter in reference.parameters():
        parameter.data *= 1.1
    reference.save_pretrained(run.output / "reference")
    plain, packed = (run(accelerated, ref_model=str(run.output / "reference"))[0] for accelerated in (False, True))
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (plain, packed)]
    assert abs(losses[0][0] - 0.6931) > 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)


def test_logits_in_the_metrics_are_means_over_the_loss_tokens(make_trainer) -> None:
    trainer = make_trainer()
    features = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(features)
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        expected = logits.mean(-1)[batch["labels"][:, 1:] != -100]
        llama_factory.accelerate_dpo(trainer)
        output = trainer.concatenated_forward(trainer.model, trainer.data_collator(features))
    found = torch.cat([output["chosen_logits"], output["rejected_logits"]])
    torch.testing.assert_close(found, expected)


def test_removing_restores_the_trainer(make_trainer) -> None:
    trainer = make_trainer()
    models = [trainer.model, trainer.ref_model]
    before = [dict(vars(trainer)), *(dict(vars(m)) for m in models), *(dict(vars(m.config)) for m in models)]
    features = [trainer.train_dataset[i] for i in range(4)]

    def loss() -> float:
        return trainer.compute_loss(trainer.model, trainer.data_collator(features)).item()

    plain = loss()
    with llama_factory.accelerate_dpo(trainer) as accelerated:
        assert loss() == pytest.approx(plain, abs=1e-5)
        assert trainer.model.config._attn_implementation.startswith("stepdpo_tree")
    after = [dict(vars(trainer)), *(dict(vars(m)) for m in models), *(dict(vars(m.config)) for m in models)]
    for old, new in zip(before, after, strict=True):
        old.pop("_stored_metrics", None), new.pop("_stored_metrics", None)
        assert old == new
    assert loss() == plain
    accelerated.remove()  # once more does nothing
    assert loss() == plain


def test_end_of_a_response(folder: Path, make_trainer, monkeypatch, tiny_tokenizer, tmp_path) -> None:
    """LLaMA-Factory's template ends a step with an end of turn; the example's tokens, and template `empty`, do not."""
    tokenizer = tiny_tokenizer("qwen2")

    def ends(**options: Any) -> set[str]:
        data = make_trainer(**options).train_dataset
        labels = [row[f"{name}_labels"] for row in data for name in ("chosen", "rejected")]
        return {tokenizer.decode([token for token in step if token != -100])[-11:] for step in labels}

    assert ends() == {"<|im_end|>\n"}
    assert {text[-1] for text in ends(template="empty")} == {"."}
    output = str(tmp_path / "tokens")
    command = ["", str(folder / "step_pairs.jsonl"), "--tokenizer", str(folder / "model"), "--output", output]
    monkeypatch.setattr(sys, "argv", command)
    tokenize_pairs.main()
    assert {text[-1] for text in ends(tokenized_path=output)} == {"."}

    rows = list(make_trainer(tokenized_path=output).train_dataset)
    texts = [tokenizer.decode(row["chosen_input_ids"]) for row in rows]
    assert all("<|im_start|>assistant\nLet's think step by step.\nStep 1:" in text for text in texts)
    problems = [text.partition("How many")[0] for text in texts]
    assert len({*problems}) == 3
    assert sum(a != b for a, b in pairwise(problems)) == 2  # each problem's pairs together


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ignore_pad_token_for_loss": False}, "ignore_pad_token_for_loss"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
    ],
    ids=["padding", "neftune"],
)
def test_options_that_are_refused(make_trainer, options: dict[str, Any], said: str) -> None:
    with pytest.raises(StepDPOError, match=said):
        llama_factory.accelerate_dpo(make_trainer(**options))


def test_trainers_and_models_that_are_refused(make_trainer) -> None:
    with pytest.raises(StepDPOError, match="stage: dpo"):
        llama_factory.accelerate_dpo(object())
    trainer = make_trainer()
    trainer.ref_model.config.attention_dropout = 0.1
    with pytest.raises(StepDPOError, match="attention_dropout is 0\\.1"):
        llama_factory.accelerate_dpo(trainer)
    assert "forward" not in vars(trainer.model)  # what was done before is undone
    trainer.ref_model.config.attention_dropout = 0.0
    handle = trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: output.float())
    with pytest.raises(StepDPOError, match="upcast_lmhead_output"):
        llama_factory.accelerate_dpo(trainer)
    handle.remove()
    llama_factory.accelerate_dpo(trainer)
    with pytest.raises(StepDPOError, match="already"):
        llama_factory.accelerate_dpo(trainer)


def test_an_untested_architecture_is_compared_first(make_trainer, monkeypatch) -> None:
    trainer = make_trainer()
    compared: list[Any] = []

    def verify(*seen: Any) -> bool:
        compared.append(seen)
        return True

    monkeypatch.setattr(forward, "verify_first_batch", verify)
    monkeypatch.setattr(forward, "is_tested", lambda lm: False)
    monkeypatch.setattr(llama_factory, "is_tested", lambda lm: False)
    llama_factory.accelerate_dpo(trainer)
    ((lm, batch),) = compared
    assert lm is trainer.model
    assert batch.num_pairs == 3
    features = [trainer.train_dataset[i] for i in range(4)]
    trainer.compute_loss(trainer.model, trainer.data_collator(features))
    assert len(compared) == 1


def test_images_are_refused(make_trainer) -> None:
    trainer = make_trainer()
    plain = trainer.data_collator
    trainer.data_collator = lambda features: plain(features) | {"pixel_values": torch.zeros(1)}
    llama_factory.accelerate_dpo(trainer)
    with pytest.raises(StepDPOError, match="pixel_values"):
        trainer.data_collator([trainer.train_dataset[0]])


@pytest.mark.parametrize(
    ("argv", "environment", "said"),
    [
        (["chat"], {}, "usage"),
        (["train", "x.yaml"], {"USE_V1": "1"}, "USE_V1"),
        (["train", "x.yaml"], {"FORCE_TORCHRUN": "1"}, "torchrun --nproc_per_node 1 -m .*llama_factory train x.yaml"),
        (["train", "--stage", "kto"], {}, "stage: kto"),
        (["train", "--stage=kto"], {}, "stage: kto"),
    ],
    ids=["chat", "v1", "torchrun", "kto", "kto, one word"],
)
def test_commands_that_are_refused(monkeypatch, argv, environment, said) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["llama_factory", *argv])
    with pytest.raises(SystemExit, match=said):
        llama_factory.main()


def test_the_example_is_what_llama_factory_takes(run: Run, folder: Path, passes: list[Any], monkeypatch) -> None:
    from omegaconf import OmegaConf

    example: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "examples/llama_factory/step_dpo.yaml"))
    monkeypatch.chdir(folder)
    (folder / "examples/llama_factory").mkdir(parents=True, exist_ok=True)
    for name in ("dataset_info.json", "step_pairs.jsonl"):
        (folder / "examples/llama_factory" / name).write_text((folder / name).read_text())
    here = {"model_name_or_path": str(folder / "model"), "bf16": False, "use_cpu": True, "num_train_epochs": 1}
    run.command(example | here | {"tokenized_path": None, "output_dir": str(run.output)})
    assert passes
