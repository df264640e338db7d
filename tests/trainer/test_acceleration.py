"""Layers that torch.compile or Liger make faster, under the packed forward."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.acceleration import accelerate_layers, layers
from stepdpo_kernels.types import StepDPOError
from tests.trainer.test_adapters import lora
from tests.trainer.training import entries, losses, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"bf16": True}),
        ("gemma2", {"gradient_checkpointing": True}),
        ("qwen3_moe", {}),
        ("llama", {"adapter": True, "reference": "adapter_off"}),
    ],
    ids=str,
)
def test_compiled_layers_train_as_others_do(tiny_model, pairs, config, tmp_path, kind, options):
    runs = []
    for compiled in (False, True):
        fields = dict(options)
        adapter = lora() if fields.pop("adapter", False) else None
        args = config(output_dir=str(tmp_path / str(compiled)), torch_compile=compiled, num_train_epochs=2, **fields)
        trainer = StepDPOTrainer(tiny_model(kind), args, pairs, peft_config=adapter)
        found = layers(trainer.model)
        assert len(found) == 2
        assert all((layer._compiled_call_impl is not None) == compiled for layer in found)
        trainer.train()
        trainer.save_model()
        runs.append((losses(trainer), weights(trainer.model)))
    tolerance = 0.02 if options.get("bf16") else 1e-4
    assert runs[1][0] == pytest.approx(runs[0][0], abs=tolerance)
    assert runs[1][1].keys() == runs[0][1].keys()
    assert entries(tmp_path / "True") == entries(tmp_path / "False")


class Graphs(TrainerCallback):
    """How many graphs torch.compile has made, at the end of each step."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_forests_of_all_sizes_share_what_was_compiled(tiny_model, pairs, config):
    torch._dynamo.reset()
    counters.clear()
    graphs = Graphs()
    StepDPOTrainer(tiny_model(), config(torch_compile=True, num_train_epochs=2), pairs, callbacks=[graphs]).train()
    assert len(graphs.made) == 12
    assert 0 < graphs.made[0] == graphs.made[-1]


def test_liger_leaves_the_head_alone(tiny_model, config, monkeypatch):
    """Its kernels need a GPU; here is what it does to a model: norms, MLPs and rotation, and not the forward."""
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which it replaces for all models to come
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = tiny_model()
    forward = model.forward
    args = config(use_liger_kernel=True)
    monkeypatch.setattr(type(args), "device", torch.device("cuda"))
    accelerate_layers(model, args)
    assert args.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert model.forward == forward
    patched = (model.model.norm.forward, model.model.layers[0].mlp.forward, modeling_llama.apply_rotary_pos_emb)
    assert all(function.__module__.startswith("liger_kernel") for function in patched)


@pytest.mark.parametrize(
    ("kind", "liger_config", "message"),
    [
        ("llama", None, "its Triton kernels need a GPU"),
        ("llama", {"fused_linear_cross_entropy": True}, "fused_linear_cross_entropy would replace this package's head"),
        ("cohere", None, "liger-kernel has nothing for cohere"),
    ],
)
def test_liger_where_it_cannot_be(tiny_model, pairs, config, tmp_path, kind, liger_config, message):
    pytest.importorskip("liger_kernel")
    args = config(use_liger_kernel=True, liger_kernel_config=liger_config)
    with pytest.raises(StepDPOError, match=message):
        StepDPOTrainer(tiny_model(kind), args, pairs)
    assert entries(tmp_path / "run") == []


def test_liger_that_is_not_installed(tiny_model, pairs, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(StepDPOError, match=r"use_liger_kernel: .* pip install liger-kernel"):
        StepDPOTrainer(tiny_model(), config(use_liger_kernel=True), pairs)
