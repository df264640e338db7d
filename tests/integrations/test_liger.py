"""FusedLinearStepDPOLoss against the installed LigerFusedLinearDPOLoss: the same results, the same gradients."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("liger_kernel")

from liger_kernel import chunked_loss as liger

from stepdpo_kernels.integrations.liger import FusedLinearStepDPOLoss
from tests.numerics import relative_error

P, T, H, V = 3, 7, 16, 53
TYPES = sorted(liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)


def problem(seed: int = 0, ignore_index: int = -100):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((V, H), (2 * P, T, H), (V,)) * 2]
    weight, hidden, bias, ref_weight, ref_hidden, ref_bias = tensors
    target = torch.randint(V, (2 * P, T), generator=generator)
    target[0, 3:] = target[1, :2] = target[4, 1:] = ignore_index
    for tensor in (weight, hidden, bias):
        tensor.requires_grad_()
    return weight, hidden, target, bias, ref_hidden, ref_weight, ref_bias


def results(loss_class, arguments, **options):
    loss, metrics = loss_class(**options)(*arguments)
    leaves = [x for x in arguments if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(3 * loss, leaves)
    return [loss, *metrics], gradients


def assert_same(arguments, **options):
    ours, our_gradients = results(FusedLinearStepDPOLoss, arguments, **options)
    theirs, their_gradients = results(liger.LigerFusedLinearDPOLoss, arguments, compiled=False, **options)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-5)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        assert relative_error(mine, other) <= 1e-5


@pytest.mark.parametrize("loss_type", TYPES)
def test_every_type_of_loss_is_ligers(loss_type):
    smoothing = {"exo_pair": 1e-3, "robust": 0.2}.get(loss_type, 0.0)
    assert_same(problem(), loss_type=loss_type, label_smoothing=smoothing, beta=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute_nll_loss": True, "alpha": 0.3},
        {"average_log_prob": True},
        {"average_log_prob": True, "compute_nll_loss": True, "loss_type": "sppo_hard"},
        {"use_ref_model": False},
        {"chunk_size": 2, "beta": 0.5},
        {"discopop_tau": 0.3, "loss_type": "discopop"},
        {"label_smoothing": 0.3},  # which the sigmoid loss of Liger leaves out, too
    ],
)
def test_every_option_is_ligers(options):
    assert_same(problem(1), **options)


def test_other_ways_to_call_it():
    weight, hidden, target, _, ref_hidden, ref_weight, _ = problem(2)
    assert_same((weight, hidden, target, None, ref_hidden, ref_weight, None))
    assert_same((weight.detach(), hidden, target, None, ref_hidden, ref_weight, None))
    assert_same(problem(3, ignore_index=7), ignore_index=7)


def test_it_is_constructed_and_called_as_liger_is():
    for method in ("__init__", "forward"):
        ours, theirs = (
            list(inspect.signature(getattr(c, method)).parameters.values())
            for c in (FusedLinearStepDPOLoss, liger.LigerFusedLinearDPOLoss)
        )
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type must be one of .* got 'ipo'"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "must be in \\[0, 0.5\\), got 0.5"),
        ({"loss_type": "exo_pair"}, "'exo_pair' must be in"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearStepDPOLoss(**options)


def test_what_does_not_fit_is_refused():
    weight, hidden, target, bias, *_ = problem()
    with pytest.raises(ValueError, match="use_ref_model needs ref_input and ref_weight"):
        FusedLinearStepDPOLoss()(weight, hidden, target, bias)
    with pytest.raises(ValueError, match=r"got \(5, 7, 16\) and \(6, 7\)"):
        FusedLinearStepDPOLoss()(weight, hidden[:5], target)
