"""padded_logps: what a model gives of a padded batch, from its forest."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stepdpo_kernels.model import padded_logps
from stepdpo_kernels.packing import pack_padded
from tests.families import FAMILIES, tiny_model
from tests.numerics import relative_error


def _batch(vocabulary: int):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (6, 20), generator=generator)
    ids[3:, :9] = ids[:3, :9]
    ids[1, :6] = ids[4, :6] = ids[0, :6]
    real = torch.ones_like(ids)
    for row, length in enumerate((20, 15, 12, 18, 19, 11)):
        real[row, length:] = 0
    wanted = torch.zeros_like(ids)
    wanted[:, 9:] = 1
    wanted[2, 3:5] = 1
    return ids, real, wanted


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_log_probs_statistics_and_gradients_are_the_padded_ones(family):
    model = tiny_model(family, **FAMILIES[family].config)
    ids, real, wanted = _batch(model.config.vocab_size)
    forest = pack_padded(ids, real, wanted)
    found = padded_logps(model, forest, statistics=True)
    assert found.statistics
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    mask = (wanted * real).bool()[:, 1:]
    logp = logits.log_softmax(-1)
    expected = logp.gather(2, ids[:, 1:, None])[..., 0] * mask
    assert forest.batch.num_tokens < real.sum() * 0.7
    torch.testing.assert_close(found.logps, expected, rtol=1e-5, atol=1e-5)
    entropy = -(logp.exp() * logp).sum(-1) * mask
    torch.testing.assert_close(found.statistics.entropy, entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.statistics.mean_logit, logits.detach().mean(-1) * mask, rtol=1e-5, atol=1e-5)
    assert found.statistics.is_top1.equal((logits.argmax(-1) == ids[:, 1:]) & mask)
    assert padded_logps(model, forest).statistics is None

    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))  # any upstream gradient
    gradients = []
    for logps in (expected, found.logps):
        model.zero_grad()
        (logps * weights).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, packed in zip(*gradients, strict=True):
        assert relative_error(packed, plain) <= 1e-5


def test_router_logits_stand_where_the_padded_ones_do():
    model = tiny_model("qwen3_moe", **FAMILIES["qwen3_moe"].config)
    ids, real, wanted = _batch(model.config.vocab_size)
    found = padded_logps(model, pack_padded(ids, real, wanted, every_token=True), router_logits=True)
    assert found.router_logits
    plain = model.model(input_ids=ids, attention_mask=real, output_router_logits=True).router_logits
    config = model.config
    losses = [
        load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, real)
        for logits in (found.router_logits, plain)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    router = model.model.layers[0].mlp.gate.weight
    gradients = [torch.autograd.grad(loss, router)[0] for loss in losses]
    assert relative_error(*gradients) <= 1e-5
