"""StepDPOConfig: defaults, what makes an optimiser step, and what is out of range."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from transformers import TrainingArguments

from stepdpo_kernels.trainer import StepDPOConfig
from stepdpo_kernels.types import StepDPOError


@pytest.fixture
def make(tmp_path):
    return lambda **options: StepDPOConfig(output_dir=str(tmp_path / "run"), **options)


def test_defaults_are_those_of_the_paper(make):
    config = make()
    assert config.beta == 0.4
    assert config.pairs_per_step == 128
    assert config.learning_rate == 5e-7
    assert config.lr_scheduler_type == "cosine"
    assert config.get_warmup_steps(1000) == 100
    assert config.num_train_epochs == 4
    assert (config.share, config.reference, config.loss_type) == ("tree", "precomputed", "sigmoid")
    assert config.report_to == []


def test_every_added_or_changed_field_has_help():
    inherited = {f.name: f for f in fields(TrainingArguments)}
    for f in fields(StepDPOConfig):
        if f.name not in inherited or f.default != inherited[f.name].default:
            assert f.metadata["help"].endswith("."), f.name


def test_pairs_a_step_from_batch_and_accumulation(make):
    config = make(per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert config.pairs_per_step == 15
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (15, 1)
    assert config.train_batch_size == 15
    assert make(per_device_train_batch_size=3).pairs_per_step == 3
    assert make(gradient_accumulation_steps=5).pairs_per_step == 5
    config = make(pairs_per_step=6, per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert config.pairs_per_step == 6
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (6, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pairs_per_step": 6, "bf16": True, "share": "pair", "beta": 0.1, "reference": "none"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "warmup_steps": 7},
        {"loss_type": "simpo", "simpo_gamma": 1.2, "rpo_alpha": 0.1, "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"loss_type": ["hinge"], "loss_weights": [0.5]},
    ],
)
def test_survives_replace_and_a_round_trip_through_its_dictionary(make, options):
    config = make(**options)
    assert replace(config, beta=0.2).to_dict() == config.to_dict() | {"beta": 0.2}
    assert replace(replace(config)).to_dict() == config.to_dict()
    again = StepDPOConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.pairs_per_step == config.pairs_per_step
    assert config.to_sanitized_dict()["pairs_per_step"] == config.pairs_per_step


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_bfloat16_on_a_cpu_needs_no_further_option(make):
    config = make(bf16=True)
    assert config.use_cpu
    assert config.device.type == "cpu"
    assert not config.dataloader_pin_memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta must be positive and finite, got 0\.0"),
        ({"beta": -1}, "beta must be positive"),
        ({"beta": float("inf")}, "beta must be positive and finite, got inf"),
        ({"beta": float("nan")}, "beta must be positive and finite, got nan"),
        ({"share": "trees"}, "share must be one of tree, pair, none, got 'trees'"),
        ({"share": None}, "share must be one of tree, pair, none, got None"),
        ({"reference": "cached"}, "reference must be one of precomputed, adapter_off, model, none, got 'cached'"),
        ({"loss_type": "dpo"}, "loss_type must be one of sigmoid, robust, hinge, ipo, simpo, sft, got 'dpo'"),
        ({"loss_type": ["sigmoid", "dpo"]}, "loss_type must be one of .*, got 'dpo'"),
        ({"loss_type": []}, r"loss_type must name at least one of sigmoid, .*, got \[\]"),
        ({"loss_type": ["sft", "sigmoid"], "loss_weights": [1.0]}, r"loss_weights must be one number .*, got \[1\.0\]"),
        ({"loss_weights": [-1.0]}, r"loss_weights must be finite and >= 0, got -1\.0 for loss_type 'sigmoid'"),
        ({"loss_type": "robust"}, "loss_type 'robust' needs label_smoothing"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "loss_type 'ipo' has no label_smoothing, got 0.1"),
        ({"simpo_gamma": 0.5}, "simpo_gamma is for loss_type 'simpo', got 0.5 with 'sigmoid'"),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma must be finite and >= 0"),
        ({"rpo_alpha": -1.0}, r"rpo_alpha must be finite and >= 0, got -1\.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be at least 1, got 0"),
        ({"pairs_per_step": 0}, "pairs_per_step must be a positive multiple of the 1 processes, got 0"),
        ({"pairs_per_step": -4}, "pairs_per_step must be a positive multiple"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"per_device_train_batch_size": 0}, "pairs_per_step must be a positive multiple of the 1 processes, got 0"),
    ],
)
def test_values_out_of_range(make, options, message):
    with pytest.raises(StepDPOError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1, "label_smoothing": 0.2, "rpo_alpha": 0.5, "reference": "none"},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.4},
        {"loss_type": ["sigmoid", "simpo", "sft"], "loss_weights": [1.0, 0.5, 0.1], "simpo_gamma": 1.0},
    ],
)
def test_the_loss_has_every_option(make, options):
    config = make(**options)
    loss = config.build_loss()
    for name in ("beta", "loss_type", "loss_weights", "label_smoothing", "rpo_alpha", "simpo_gamma"):
        assert getattr(loss, name) == getattr(config, name)
        assert getattr(loss, name) == options.get(name, getattr(make(), name))
    assert loss.reference_free == (config.reference == "none")


def test_simpo_has_no_reference(make):
    assert make(loss_type="simpo").reference == "none"
    assert make(loss_type="ipo").reference == "precomputed"
    assert make(loss_type=["simpo", "sft"]).reference == "none"
    assert make(loss_type=["sft", "sigmoid"]).reference == "precomputed"


def test_pairs_a_step_must_divide_among_the_processes(make, monkeypatch):
    monkeypatch.setattr(StepDPOConfig, "world_size", property(lambda self: 3))
    assert make(pairs_per_step=6).per_device_train_batch_size == 2
    assert make(per_device_train_batch_size=2, gradient_accumulation_steps=2).pairs_per_step == 12
    with pytest.raises(StepDPOError, match="pairs_per_step must be a positive multiple of the 3 processes, got 128"):
        make(pairs_per_step=128)
