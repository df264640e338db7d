"""linear_statistics against the definitions from full logits."""

from __future__ import annotations

import pytest
import torch

from stepdpo_kernels.ops.linear_logprob import linear_statistics, statistics
from stepdpo_kernels.ops.linear_logprob.api import linear_logprob


def _problem(dtype, vocabulary=1300, rows=37):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 24, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), target, bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}])
def test_statistics_are_those_of_full_logits(dtype, options, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4)  # the least number of columns: three chunks, the last one short
    hidden, weight, target, bias = _problem(dtype)
    z = hidden.double() @ weight.double().T + bias.double()
    if options:
        z = options["softcap"] * torch.tanh(z * options["logit_scale"] / options["softcap"])
    target[::3] = z.argmax(1)[::3]
    found = linear_statistics(hidden, weight, target, bias=bias, **options)
    logp = z.log_softmax(1)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    expected = {
        "entropy": -(logp.exp() * logp).sum(1),
        "log_sum_sq_probs": (2 * logp).logsumexp(1),
        "mean_logit": z.mean(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=tolerance, atol=tolerance)
    if dtype != torch.bfloat16:
        assert found.is_top1.equal(target == z.argmax(1))
    assert found.entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert not found.entropy.requires_grad


def test_statistics_follow_autocast_as_log_probs_do():
    hidden, weight, target, _ = _problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_statistics(hidden, weight, target)
        logps = linear_logprob(hidden, weight, target)
    plain = linear_statistics(hidden.bfloat16(), weight.bfloat16(), target)
    assert all(a.equal(b) for a, b in zip(cast, plain, strict=True))
    assert logps.equal(linear_logprob(hidden.bfloat16(), weight.bfloat16(), target))


def test_no_rows_have_no_statistics():
    hidden, weight, target, _ = _problem(torch.float32)
    assert [x.shape for x in linear_statistics(hidden[:0], weight, target[:0])] == [(0,)] * 4
