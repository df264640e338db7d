"""Models and tokenizers from folders, and folders that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepdpo_kernels.trainer import StepDPOTrainer, load_model, load_tokenizer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import assert_same_weights, entries, weights


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder(tiny_model, tiny_tokenizer, folder):
    model = load_model(str(folder))
    assert_same_weights(weights(model), weights(tiny_model()))
    assert load_tokenizer(str(folder)).get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_have_the_dtype_that_was_asked_for_not_the_one_on_disk(tiny_model, tmp_path, name, dtype):
    for on_disk in (torch.float32, torch.bfloat16):
        tiny_model(dtype=on_disk).save_pretrained(tmp_path / str(on_disk))
        model = load_model(str(tmp_path / str(on_disk)), name)
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_trainer_takes_a_path(folder, pairs, config):
    trainer = StepDPOTrainer(str(folder), config(max_steps=1), pairs)
    assert next(trainer.model.parameters()).dtype == torch.float32
    trainer.train()


def test_a_tied_head_is_not_missing(tiny_model, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    model = load_model(str(tmp_path / "tied"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_home_folder_is_meant_by_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    load_model("~/model")
    load_tokenizer("~/model")


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def headless(folder):
    from transformers import AutoModel

    AutoModel.from_pretrained(folder).save_pretrained(folder)


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "cannot be read: ValueError: Unrecognized model"),
        (write("config.json", "{bad"), "cannot be read: OSError: .*not a valid JSON file"),
        (write("config.json", "{}"), "cannot be read: ValueError: Unrecognized model"),
        (remove("model.safetensors"), "cannot be read: OSError: .*no file named model.safetensors"),
        (truncate, "cannot be read: SafetensorError"),
        (headless, r"lacks 1 of the weights of a LlamaForCausalLM, which would begin at random: lm_head\.weight"),
        (other_shape, "cannot be read: RuntimeError"),
    ],
)
def test_a_damaged_model(folder, damage, message):
    damage(folder)
    with pytest.raises(StepDPOError, match=message) as error:
        load_model(str(folder))
    assert str(error.value).startswith(f"model {str(folder)!r}")


@pytest.mark.parametrize("damage", [remove("tokenizer.json"), write("tokenizer.json", "{bad")])
def test_a_damaged_tokenizer(folder, damage):
    damage(folder)
    with pytest.raises(StepDPOError, match=r"tokenizer .*: cannot be read: "):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_places_without_a_model(load, tmp_path):
    with pytest.raises(StepDPOError, match=r"/nowhere': no such folder or file$"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StepDPOError, match=r"the folder holds no transformers .* and no GGUF file"):
        load(str(tmp_path / "empty"))
    for name in ("no-such-org/no-such-model", "no-such-model"):
        with pytest.raises(StepDPOError, match=rf"'{name}': no such folder, and not to be had from the hub: OSError"):
            load(name)
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    with pytest.raises(StepDPOError, match="holds 2 GGUF files: name one"):
        load(str(tmp_path / "two"))


def test_an_unknown_dtype(folder):
    with pytest.raises(StepDPOError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        load_model(str(folder), "int8")


def test_a_model_of_another_kind(pairs, config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    for given in (model, str(tmp_path / "gpt2")):
        with pytest.raises(StepDPOError, match=r"model GPT2LMHeadModel cannot be packed: attn_pdrop is 0\.1"):
            StepDPOTrainer(given, config(), pairs)
    assert entries(tmp_path) == ["gpt2", "pairs.jsonl"]
