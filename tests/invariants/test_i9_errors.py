"""I9: bad input to `stepdpo train` gives one message that names it, exit status 2, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from stepdpo_kernels.cli import main
from stepdpo_kernels.data import StepPairDataset
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer
from stepdpo_kernels.types import StepDPOError, StepPair
from tests.trainer.training import entries, make_config, make_pairs, write_jsonl


@pytest.fixture
def records(step_records) -> list[Any]:
    return step_records(2, 4)


@pytest.fixture
def model(tiny_model, tiny_tokenizer, tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(model, records, tmp_path, capsys) -> Callable[..., str]:
    """refused(*options, data=records): what `stepdpo train` said on stderr, having written nothing, exit status 2."""

    def run(*options: str, data: Any = None, **replaced: Any) -> str:
        source = data if isinstance(data, Path) else write_jsonl(tmp_path / "data.jsonl", data or records)
        settings = {
            "model": model,
            "data": source,
            "output-dir": tmp_path / "deep" / "run",
            "reference_cache_dir": tmp_path / "cache",
            "pairs_per_step": 4,
            "max_steps": 2,
            **replaced,
        }
        arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        folders = {folder for folder in tmp_path.rglob("*") if folder.is_dir()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["train", *arguments, *options])
        captured = capsys.readouterr()
        assert exit_.value.code == 2, captured
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
        assert {folder for folder in tmp_path.rglob("*") if folder.is_dir()} == folders
        assert "Traceback" not in captured.err
        return captured.err

    return run


def test_i9_the_command_works_when_nothing_is_wrong(model, records, tmp_path, capsys):
    """Otherwise the refusals below would prove nothing."""
    data = write_jsonl(tmp_path / "data.jsonl", records)
    out = tmp_path / "deep" / "run"
    options = f"--pairs_per_step 4 --max_steps 2 --reference_cache_dir {tmp_path / 'cache'} --disable_tqdm true"
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--model", str(model), "--data", str(data), "--output-dir", str(out), *options.split()])
    assert exit_.value.code == 0
    assert "trained 2 steps on 8 pairs" in capsys.readouterr().out
    assert {"model.safetensors", "config.json", "tokenizer.json", "checkpoint-2"} <= set(entries(out))


# ---- records --------------------------------------------------------------------------------------------------------


def test_i9_malformed_line(refused, records):
    message = refused(data=[*records[:2], '{"prompt": "Ann has', *records[2:]])
    assert "data.jsonl, line 3: malformed JSON" in message


def test_i9_missing_field(refused, records):
    del records[4]["rejected"]
    assert "data.jsonl, line 5: field 'rejected' is missing" in refused(data=records)


def test_i9_field_of_the_wrong_type(refused, records):
    records[1]["chosen"] = ["a", "b"]
    assert "data.jsonl, line 2: field 'chosen' must be a string, got list ['a', 'b']" in refused(data=records)
    records[1]["chosen"] = None
    assert "data.jsonl, line 2: field 'chosen' must be a string, got null" in refused(data=records)


@pytest.mark.parametrize("weight", [-1, "NaN"])
def test_i9_weight_out_of_range(refused, records, weight):
    lines = [json.dumps(record | {"weight": 1}) for record in records]
    lines[3] = lines[3].replace('"weight": 1', f'"weight": {weight}')
    assert "data.jsonl, line 4: field 'weight' must be finite and at least 0" in refused(data=lines)


def test_i9_equal_steps_under_strict(refused, records):
    records[2]["rejected"] = records[2]["chosen"]
    message = refused("--strict", data=records)
    assert "data.jsonl, line 3" in message
    assert "fields 'chosen' and 'rejected' have the same tokens" in message


def test_i9_only_unusable_records(refused, records):
    for record in records:
        record["rejected"] = record["chosen"]
    assert "no record can be used" in refused(data=records)


def test_i9_empty_file(refused, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "empty.jsonl: the file holds no records" in refused(data=empty)


def test_i9_no_file(refused, tmp_path):
    assert "nowhere.jsonl: no such file or folder" in refused(data=tmp_path / "nowhere.jsonl")


def test_i9_pair_over_the_length_under_strict(refused, records):
    message = refused("--strict", "--max_length", "60", data=records)
    assert "data.jsonl, line 1" in message
    assert "exceed max_length 60; raise max_length to 68" in message


def test_i9_pair_over_the_budget(refused, records):
    """Under strict the first is refused; else it is left out, and so is everything here."""
    assert "exceed max_tokens 60" in refused("--strict", "--max_tokens_per_batch", "60", data=records)
    assert "8 left out as too_long" in refused("--max_tokens_per_batch", "60", data=records)


def test_i9_bad_evaluation_data(refused, records, tmp_path):
    bad = write_jsonl(tmp_path / "eval.jsonl", [*records[:1], "[]"])
    assert "eval.jsonl, line 2: a record must be an object" in refused(
        "--eval_data", str(bad), "--eval_strategy", "epoch"
    )


# ---- model and tokenizer --------------------------------------------------------------------------------------------


def test_i9_model_that_is_not_there(refused, tmp_path):
    message = refused(model=tmp_path / "nowhere")
    assert f"tokenizer {str(tmp_path / 'nowhere')!r}: no such folder or file" in message
    message = refused("--tokenizer", str(tmp_path / "model"), model=tmp_path / "nowhere")
    assert f"model {str(tmp_path / 'nowhere')!r}: no such folder or file" in message


def test_i9_model_of_an_unsupported_kind(refused, tiny_tokenizer, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    message = refused(model=tmp_path / "bloom")
    assert "model BloomForCausalLM cannot be packed: BloomForCausalLM does not call its attention through" in message


def test_i9_model_with_dropout(refused, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model(attention_dropout=0.1).save_pretrained(tmp_path / "dropout")
    tiny_tokenizer().save_pretrained(tmp_path / "dropout")
    assert "attention_dropout is 0.1; set it to 0.0" in refused(model=tmp_path / "dropout")


def test_i9_tokenizer_with_more_tokens_than_the_model(refused, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model(vocab_size=350).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    assert "the tokenizer has 400 tokens and the model only 350" in refused(model=tmp_path / "small")


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-such-option", "3"], "unknown option '--no-such-option'"),
        (["--betta", "0.3"], "unknown option '--betta'"),
        (["--bet", "0.3"], "unknown option '--bet'"),  # no abbreviations, which another option would make ambiguous
        (["stray"], "unknown option 'stray'"),
        (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
        (["--beta", "0"], "beta must be positive and finite, got 0.0"),
        (["--beta"], "argument --beta: expected one argument"),
        (["--share", "trees"], "share must be one of tree, pair, none, got 'trees'"),
        (["--reference", "cached"], "reference must be one of precomputed, adapter_off, model, none, got 'cached'"),
        (["--loss_type", "kto"], "loss_type must be one of sigmoid, robust, hinge, ipo, simpo, sft, got 'kto'"),
        (["--pairs_per_step", "0"], "pairs_per_step must be a positive multiple of the 1 processes, got 0"),
        (["--template", "vicuna"], "template"),
        (["--boundary", "loose"], "boundary"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--lr_scheduler_type", "wavy"], "wavy"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy 'steps' needs eval_data"),
        (["--resume_from_checkpoint", "true"], "holds no run to resume"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' lacks trainer_state.json and optimizer.pt"),
        (["--config", "nowhere.yaml"], "config 'nowhere.yaml': cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_i9_options(refused, options, message):
    assert message in refused(*options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.3", "unknown option 'betta'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("1: 2", "unknown option 1"),
        ("beta: [0.1, 0.2]", "unknown option '0.2'"),
        ("beta: {a: 1}", "argument --beta: invalid float value"),
        ("share: trees", "share must be one of tree, pair, none, got 'trees'"),
        ("- beta", "must be a mapping of options to values, got list"),
        ("", "must be a mapping of options to values, got NoneType"),
        ("beta: 'open", "cannot be read"),
        ("beta: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("\ud800", "cannot be read"),
    ],
)
def test_i9_yaml(refused, tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    assert message in refused("--config", str(file))


def test_i9_required_options(refused, capsys):
    for arguments in (["train"], ["train", "--model", "m"], ["train", "--data", "d"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "the following arguments are required: --" in capsys.readouterr().err


# ---- output folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["stepdpo_run.json"], "holds another run: choose a new folder, or continue that run"),
        (["checkpoint-3/model.safetensors"], "holds another run"),
        (["model.safetensors"], "holds a model: choose a new folder"),
        (["config.json"], "holds a model: choose a new folder"),
    ],
)
def test_i9_output_folder_in_use(refused, tmp_path, content, message):
    out = tmp_path / "used"
    for name in content:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    assert f"output_dir {str(out)!r} {message}" in refused(**{"output-dir": out})


def test_i9_output_folder_is_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file: name a folder" in refused(**{"output-dir": tmp_path / "file"})


def test_i9_training_on_the_models_own_folder(refused, model):
    assert "holds a model: choose a new folder" in refused(**{"output-dir": model})


# ---- the trainer without the command --------------------------------------------------------------------------------


@pytest.fixture
def pairs(records, tiny_tokenizer, tmp_path) -> StepPairDataset:
    return make_pairs(records, tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_dataset holds no pairs"),
        ([{"prompt": "p", "chosen": "c"}], "train_dataset must be a sequence of StepPair, but its item 0 is a dict"),
        ({"train": []}, "train_dataset must be a sequence of StepPair, but its item 0 is a str"),
        (iter([]), "train_dataset must be a sequence of StepPair, got list_iterator"),
        (None, "train_dataset is missing"),
        ([StepPair([1, 2], [600], [3], id="far")], r"pair 'far': chosen_ids\[0\] is token 600, but .* has 512 tokens"),
        (
            [StepPair([1] * 300, [5], [3], id="long")],
            "pair 'long' takes 300 tokens, more than max_tokens_per_batch=250",
        ),
    ],
)
def test_i9_trainer_datasets(tiny_model, tmp_path, data, message):
    with pytest.raises(StepDPOError, match=message):
        StepDPOTrainer(tiny_model(), make_config(tmp_path), data).train()
    if data is not None:
        assert entries(tmp_path) == []


def test_i9_a_pair_beyond_the_budget_of_keys(tiny_model, tmp_path):
    pairs = [StepPair([1] * 90, [5, 6, 7], [3, 4], id="long")]
    with pytest.raises(StepDPOError, match="pair 'long' takes 183 keys, more than max_keys_per_batch=182"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path, max_keys_per_batch=182), pairs)
    with pytest.raises(StepDPOError, match="max_keys_per_batch must be at least 1, got 0"):
        make_config(tmp_path, max_keys_per_batch=0)


def test_i9_trainer_evaluation_dataset(tiny_model, pairs, tmp_path):
    with pytest.raises(StepDPOError, match="eval_dataset must be a sequence of StepPair, but its item 0 is a str"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path), pairs, eval_dataset={"held out": pairs})
    assert entries(tmp_path) == ["pairs.jsonl"]
    trainer = StepDPOTrainer(tiny_model(), make_config(tmp_path), pairs)
    with pytest.raises(StepDPOError, match="eval_dataset holds no pairs"):
        trainer.evaluate([])


def test_i9_trainer_reference_model(tiny_model, pairs, tmp_path):
    with pytest.raises(StepDPOError, match=r"attention_dropout is 0\.1"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path), pairs, ref_model=tiny_model(attention_dropout=0.1))
    with pytest.raises(StepDPOError, match="expected a transformers causal language model, got Linear"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path), pairs, ref_model=nn.Linear(2, 2))
    assert entries(tmp_path) == ["pairs.jsonl"]


def test_i9_trainer_arguments(tiny_model, pairs, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(StepDPOError, match="args must be a StepDPOConfig, got TrainingArguments"):
        StepDPOTrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path / "run")), pairs)
    with pytest.raises(StepDPOError, match="tokenizer has"):
        StepDPOTrainer(tiny_model(vocab_size=256), make_config(tmp_path), None, processing_class=["a"] * 257)
    assert entries(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("FSDP", "training under FSDP1 is not supported: use DistributedDataParallel"),
        ("MEGATRON_LM", "training under Megatron-LM is not supported"),
        ("DEEPSPEED", "deepspeed shards over processes with a GPU each: start them with torchrun"),
    ],
)
def test_i9_ways_of_distributing_by_accelerate_launch(tiny_model, pairs, tmp_path, monkeypatch, mode, said):
    config = make_config(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{mode}", "true")
    with pytest.raises(StepDPOError, match=said):
        StepDPOTrainer(tiny_model(), config, pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fsdp_config": {"version": 1}}, "training under FSDP1 is not supported"),
        ({"fsdp_config": {"xla": True}}, "training under XLA is not supported"),
        ({}, "fsdp shards over processes: start them with torchrun or accelerate launch"),
    ],
)
def test_i9_ways_of_distributing_by_arguments(tiny_model, pairs, tmp_path, settings, said):
    with pytest.raises(StepDPOError, match=said):
        StepDPOTrainer(tiny_model(), make_config(tmp_path, fsdp=True, **settings), pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize("option", ["auto_find_batch_size", "bf16_full_eval", "fp16_full_eval"])
def test_i9_options_that_would_replace_or_skip_our_forward(tiny_model, pairs, tmp_path, option):
    config = make_config(tmp_path)
    setattr(config, option, True)
    with pytest.raises(StepDPOError, match=f"{option}: not supported by StepDPOTrainer"):
        StepDPOTrainer(tiny_model(), config, pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("torch_empty_cache_steps", 1),
        ("batch_eval_metrics", True),
        ("include_for_metrics", ["loss"]),
        ("prediction_loss_only", True),
        ("include_num_input_tokens_seen", "all"),
        ("dataloader_in_order", False),
        ("optim", "lomo"),
    ],
)
def test_i9_settings_that_would_have_no_effect(tiny_model, pairs, tmp_path, option, value):
    with pytest.raises(StepDPOError, match=f"^{option}(=lomo)?: not supported by StepDPOTrainer"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path, **{option: value}), pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize("option", ["preprocess_logits_for_metrics", "compute_loss_func", "data_collator"])
def test_i9_arguments_that_would_have_no_effect(tiny_model, pairs, tmp_path, option):
    with pytest.raises(StepDPOError, match=f"{option}: not supported by StepDPOTrainer"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path), pairs, **{option: print})
    assert entries(tmp_path) == ["pairs.jsonl"]


def test_i9_several_gpus_in_one_process(tiny_model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(StepDPOConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(StepDPOError, match="2 GPUs are visible to one process"):
        StepDPOTrainer(tiny_model(), make_config(tmp_path), pairs)
    assert entries(tmp_path) == ["pairs.jsonl"]
