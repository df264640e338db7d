"""The loss, padded and packed, against the paper's formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels.loss import LOSS_TYPES, StepDPOLoss, StepDPOOutput
from stepdpo_kernels.loss.reference import step_dpo_loss
from stepdpo_kernels.ops.linear_logprob import linear_logprob
from stepdpo_kernels.packing import SHARE_MODES, build_batch
from stepdpo_kernels.types import StepPair
from tests.forests import forest_pairs, make_pair, nested_pairs, step_pairs
from tests.loss.states import D, V, packed_hidden, padded_hidden, parameters, small


def _formula(
    embedding: Tensor,
    weight: Tensor,
    pairs: list[StepPair],
    ref_logps: Tensor,
    beta: float,
    smoothing: float,
    use_weights: bool,
) -> Tensor:
    """Equation 2 of the paper, pair by pair and token by token."""

    def logp(prefix: list[int], step: list[int]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k, token in enumerate(step):
            state = torch.tanh(embedding[[*prefix, *step[:k]]].sum(0))
            logits = weight @ state
            total = total + logits[token] - logits.exp().sum().log()
        return total

    losses = []
    for i, pair in enumerate(pairs):
        prefix = pair.prefix_ids.tolist()
        win = logp(prefix, pair.chosen_ids.tolist()) - ref_logps[i]
        lose = logp(prefix, pair.rejected_ids.tolist()) - ref_logps[len(pairs) + i]
        p = 1 / (1 + torch.exp(-beta * (win - lose)))
        loss = -(1 - smoothing) * torch.log(p) - smoothing * torch.log(1 - p)
        losses.append(loss * (pair.weight if use_weights else 1))
    return torch.stack(losses).mean()


PAIRS = small(nested_pairs(V))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("beta", [0.1, 0.4, 3.0])
def test_padded_loss_is_the_papers_formula(beta: float, smoothing: float) -> None:
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS)
    policy = StepDPOLoss(reference_free=True)(hidden, weight, labels)
    # margins of either sign, not so far from 0 that the formula's 1 - p loses digits
    ref_logps = torch.cat([policy.chosen_logps, policy.rejected_logps]) + torch.randn(2 * len(PAIRS)).double()
    out = StepDPOLoss(beta, label_smoothing=smoothing)(hidden, weight, labels, ref_logps)
    logits = hidden @ weight.T
    twin = step_dpo_loss(logits, labels, ref_logps, beta=beta, label_smoothing=smoothing)
    formula = _formula(embedding, weight, PAIRS, ref_logps, beta, smoothing, use_weights=False)
    gradients = torch.autograd.grad(out.loss, [embedding, weight], retain_graph=True)
    for loss in (twin, formula):
        torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)
        expected = torch.autograd.grad(loss, [embedding, weight], retain_graph=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("share", SHARE_MODES)
def test_packed_loss_is_the_papers_formula_with_weights(share: str, smoothing: float) -> None:
    embedding, weight = parameters()
    ref_logps = -20 + torch.randn(2 * len(PAIRS), dtype=torch.float64)
    batch = build_batch(PAIRS, range(len(PAIRS)), share)
    loss_fn = StepDPOLoss(label_smoothing=smoothing)
    out = loss_fn.packed(packed_hidden(embedding, batch), weight, batch, ref_logps)
    formula = _formula(embedding, weight, PAIRS, ref_logps, 0.4, smoothing, use_weights=True)
    hidden, labels = padded_hidden(embedding, PAIRS)
    twin = step_dpo_loss(
        hidden @ weight.T, labels, ref_logps, beta=0.4, label_smoothing=smoothing, weights=batch.weights.double()
    )
    gradients = torch.autograd.grad(out.loss, [embedding, weight], retain_graph=True)
    for loss in (formula, twin):
        torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)
        expected = torch.autograd.grad(loss, [embedding, weight], retain_graph=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(step_pairs(), st.sampled_from(SHARE_MODES))
def test_any_forest(pairs: list[StepPair], share: str) -> None:
    torch.manual_seed(0)
    pairs = small(pairs)
    embedding, weight = parameters()
    ref_logps = -5 + torch.randn(2 * len(pairs), dtype=torch.float64)
    batch = build_batch(pairs, range(len(pairs)), share)
    out = StepDPOLoss().packed(packed_hidden(embedding, batch), weight, batch, ref_logps)
    hidden, labels = padded_hidden(embedding, pairs)
    padded = StepDPOLoss()(hidden, weight, labels, ref_logps)
    torch.testing.assert_close(out.chosen_logps, padded.chosen_logps)
    torch.testing.assert_close(out.rejected_logps, padded.rejected_logps)
    expected = step_dpo_loss(hidden @ weight.T, labels, ref_logps, weights=batch.weights.double())
    torch.testing.assert_close(out.loss, expected)
    gradients = torch.autograd.grad(out.loss, [embedding, weight])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [embedding, weight]))


def test_the_formula_by_hand() -> None:
    # two tokens, logits 0 and log 3: probabilities 1/4 and 3/4
    hidden, weight = torch.tensor([[[math.log(3)]], [[math.log(3)]]]), torch.tensor([[0.0], [1.0]])
    labels = torch.tensor([[1], [0]])
    out = StepDPOLoss(beta=0.5)(hidden, weight, labels, torch.tensor([math.log(0.5), math.log(0.5)]))
    # log-ratios log 1.5 and log 0.5, margin 0.5 * log 3
    assert out.loss.item() == pytest.approx(math.log(1 + 3**-0.5), rel=1e-6)
    assert out.chosen_logps.item() == pytest.approx(math.log(0.75), rel=1e-6)
    assert out.rejected_logps.item() == pytest.approx(math.log(0.25), rel=1e-6)
    assert out.chosen_rewards.item() == pytest.approx(0.5 * math.log(1.5), rel=1e-6)
    assert out.rejected_rewards.item() == pytest.approx(0.5 * math.log(0.5), rel=1e-6)
    assert out.margins.item() == pytest.approx(0.5 * math.log(3), rel=1e-6)
    assert out.accuracy.item() == 1
    smooth = StepDPOLoss(beta=0.5, label_smoothing=0.25)(hidden, weight, labels, torch.full((2,), math.log(0.5)))
    expected = 0.75 * math.log(1 + 3**-0.5) + 0.25 * math.log(1 + 3**0.5)
    assert smooth.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_comes_back(dtype: torch.dtype) -> None:
    embedding, weight = parameters(dtype)
    batch = build_batch(PAIRS, range(len(PAIRS)), "tree")
    pairs = len(PAIRS)
    ref_logps = -20 + torch.randn(2 * pairs)
    hidden, labels = padded_hidden(embedding, PAIRS)
    for out in (
        StepDPOLoss().packed(packed_hidden(embedding, batch), weight, batch, ref_logps),
        StepDPOLoss()(hidden, weight, labels, ref_logps),
    ):
        assert out.loss.shape == ()
        assert out.loss.requires_grad
        for name in (f for f in StepDPOOutput._fields if f != "loss"):
            value = getattr(out, name)
            assert value.shape == (pairs,)
            assert value.dtype == torch.float32
            assert not value.requires_grad
        torch.testing.assert_close(out.chosen_rewards, 0.4 * (out.chosen_logps - ref_logps[:pairs]))
        torch.testing.assert_close(out.rejected_rewards, 0.4 * (out.rejected_logps - ref_logps[pairs:]))
        assert torch.equal(out.margins, out.chosen_rewards - out.rejected_rewards)
        assert torch.equal(out.accuracy, (out.margins > 0).float())


def test_metrics_keep_no_graph_alive() -> None:
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS)
    out = StepDPOLoss(reference_free=True)(hidden, weight, labels)
    assert all(getattr(out, f).grad_fn is None for f in StepDPOOutput._fields if f != "loss")


def test_reference_free_is_a_reference_of_zero() -> None:
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS)
    batch = build_batch(PAIRS, range(len(PAIRS)), "tree")
    packed, zeros = packed_hidden(embedding, batch), torch.zeros(2 * len(PAIRS))
    free, zero = StepDPOLoss(reference_free=True), StepDPOLoss()
    assert torch.equal(free(hidden, weight, labels).loss, zero(hidden, weight, labels, zeros).loss)
    assert torch.equal(free.packed(packed, weight, batch).loss, zero.packed(packed, weight, batch, zeros).loss)
    # what is not wanted is not used
    assert torch.equal(free(hidden, weight, labels, zeros + 7).loss, free(hidden, weight, labels).loss)


def test_parts_add_up_with_num_pairs() -> None:
    embedding, weight = parameters()
    n = len(PAIRS)
    ref_logps = -20 + torch.randn(2 * n, dtype=torch.float64)

    def packed(indices: list[int], num_pairs: float | None = None) -> Tensor:
        batch = build_batch(PAIRS, indices, "tree")
        refs = torch.cat([ref_logps[indices], ref_logps[[n + i for i in indices]]])
        loss_fn = StepDPOLoss()
        return loss_fn.packed(packed_hidden(embedding, batch), weight, batch, refs, num_pairs=num_pairs).loss

    whole = packed(list(range(n)))
    split = packed([4, 1], n) + packed([0], n) + packed([2, 3, 5, 6, 7], n)
    torch.testing.assert_close(whole, split, rtol=1e-12, atol=0)
    # not the mean of means
    assert abs(packed([4, 1]) / 3 + packed([0]) / 3 + packed([2, 3, 5, 6, 7]) / 3 - whole) > 1e-3
    hidden, labels = padded_hidden(embedding, PAIRS)
    dense = StepDPOLoss()(hidden, weight, labels, ref_logps)
    doubled = StepDPOLoss()(hidden, weight, labels, ref_logps, num_pairs=2 * n)
    torch.testing.assert_close(dense.loss, 2 * doubled.loss)


def test_weights_weigh_pairs() -> None:
    embedding, weight = parameters()
    base = make_pair([1, 2], [3, 4], [5, 6])
    other = make_pair([1, 7], [3, 4, 5], [8])

    def loss(*weights: float) -> Tensor:
        pairs = [
            make_pair(p.prefix_ids, p.chosen_ids, p.rejected_ids, weight=w)
            for p, w in zip((base, other), weights, strict=True)
        ]
        batch = build_batch(pairs, [0, 1], "tree")
        return StepDPOLoss(reference_free=True).packed(packed_hidden(embedding, batch), weight, batch).loss

    torch.testing.assert_close(loss(0.5, 3), 0.5 * loss(1, 0) + 3 * loss(0, 1))
    torch.testing.assert_close(loss(1, 1), loss(1, 0) + loss(0, 1))
    assert loss(0, 0).item() == 0


@pytest.mark.parametrize("share", SHARE_MODES)
def test_an_empty_branch_has_log_prob_zero_and_stays_in_the_graph(share: str) -> None:
    embedding, weight = parameters()
    for pair in (make_pair([1, 2], [], [3, 4]), make_pair([1, 2], [3, 4], []), make_pair([1, 2], [], [])):
        batch = build_batch([pair], [0], share)
        out = StepDPOLoss(reference_free=True).packed(packed_hidden(embedding, batch), weight, batch)
        for step, logp in ((pair.chosen_ids, out.chosen_logps), (pair.rejected_ids, out.rejected_logps)):
            assert (logp.item() == 0) == (step.size == 0)
        gradients = torch.autograd.grad(out.loss, [embedding, weight])  # none missing
        hidden, labels = padded_hidden(embedding, [pair])
        plain = StepDPOLoss(reference_free=True)(hidden, weight, labels)
        torch.testing.assert_close(out.loss, plain.loss)
        torch.testing.assert_close(gradients, torch.autograd.grad(plain.loss, [embedding, weight]))


def test_no_labels_at_all() -> None:
    embedding, weight = parameters()
    hidden = torch.tanh(embedding[torch.ones(4, 3, dtype=torch.int64)])
    out = StepDPOLoss(reference_free=True)(hidden, weight, torch.full((4, 3), -100))
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert out.accuracy.tolist() == [0, 0]  # a margin of 0 prefers nothing
    assert not any(g.any() for g in torch.autograd.grad(out.loss, [embedding, weight]))
    none = StepDPOLoss(reference_free=True)(hidden[:0], weight, torch.full((0, 3), -100))
    assert none.loss.item() == 0
    assert none.margins.shape == (0,)


@pytest.mark.parametrize("margin", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_margins_far_from_zero(margin: float, smoothing: float) -> None:
    embedding, weight = parameters(torch.float32)
    hidden, labels = padded_hidden(embedding, PAIRS[:1])
    refs = torch.tensor([-margin / 0.4, 0.0])
    out = StepDPOLoss(label_smoothing=smoothing)(hidden, weight, labels, refs)
    wrong_way = (1 - smoothing) if margin < 0 else smoothing
    assert out.loss.item() == pytest.approx(wrong_way * abs(margin), rel=0.2, abs=1e-6)
    for gradient in torch.autograd.grad(out.loss, [embedding, weight]):
        assert gradient.isfinite().all()
        # e^-100 at most, where the preference is met
        assert (gradient.abs().max() > 1e-3) == (wrong_way > 0)


def test_options_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, weight = parameters()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    hidden, labels = padded_hidden(embedding, PAIRS)
    batch = build_batch(PAIRS, range(len(PAIRS)), "tree")
    for options in ({"softcap": 2.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 0.3}):
        logits = options.get("logit_scale", 1) * (hidden @ weight.T + bias)
        if "softcap" in options:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        refs = torch.zeros(2 * len(PAIRS))
        expected = step_dpo_loss(logits, labels, refs)
        loss_fn = StepDPOLoss(reference_free=True, **options)
        torch.testing.assert_close(loss_fn(hidden, weight, labels, bias=bias).loss, expected)
        weighted = step_dpo_loss(logits, labels, refs, weights=batch.weights.double())
        ours = loss_fn.packed(packed_hidden(embedding, batch), weight, batch, bias=bias).loss
        torch.testing.assert_close(ours, weighted)
        torch.testing.assert_close(torch.autograd.grad(ours, bias), torch.autograd.grad(weighted, bias))
    with pytest.raises(ValueError, match="no implementation 'fast' of operation 'linear_logprob'"):
        StepDPOLoss(reference_free=True, impl="fast")(hidden, weight, labels)


def test_branch_log_probs_chosen_first_then_rejected() -> None:
    embedding, weight = parameters()
    batch = build_batch(PAIRS, [3, 0, 5], "tree")
    hidden = packed_hidden(embedding, batch)
    logps = StepDPOLoss().packed_logps(hidden, weight, batch)
    assert logps.shape == (6,)
    out = StepDPOLoss(reference_free=True).packed(hidden, weight, batch)
    assert torch.equal(logps, torch.cat([out.chosen_logps, out.rejected_logps]))
    states, labels = padded_hidden(embedding, [PAIRS[i] for i in (3, 0, 5)])
    keep = labels != -100
    plain = (states @ weight.T).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(logps, (plain * keep).sum(1))


def test_long_branches_are_summed_without_loss() -> None:
    # 3000 tokens of 4 nats each: a float32 running sum is off by more than the margins that matter
    weight = parameters(torch.float32)[1].detach()
    tokens = torch.randint(V, (3, 3000)).numpy()
    pairs = [make_pair(tokens[0, :5], tokens[1], tokens[2])]
    batch = build_batch(pairs, [0], "pair")
    hidden = torch.randn(batch.num_tokens, D)
    ours = StepDPOLoss().packed_logps(hidden, weight, batch)
    each = linear_logprob(hidden[batch.rows.index], weight, batch.targets)
    exact = torch.stack([each[rows].double().sum() for rows in batch.branches.index.split([3000, 3000])])
    assert exact.max() < -8000
    assert torch.equal(ours, exact.float())
    states = torch.randn(2, 3000, D)
    labels = torch.as_tensor(tokens[1:])
    out = StepDPOLoss(reference_free=True)(states, weight, labels)
    each = linear_logprob(states.flatten(0, 1), weight, labels.flatten()).view(2, 3000)
    assert torch.equal(torch.cat([out.chosen_logps, out.rejected_logps]), each.double().sum(1).float())


def test_what_is_frozen_gets_no_gradient() -> None:
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS)
    StepDPOLoss(reference_free=True)(hidden, weight.detach(), labels).loss.backward()
    assert weight.grad is None
    assert embedding.grad is not None
    with torch.no_grad():
        assert not StepDPOLoss(reference_free=True)(hidden, weight, labels).loss.requires_grad


def test_a_module_without_parameters() -> None:
    loss_fn = StepDPOLoss(beta=0.25, label_smoothing=0.1)
    assert not list(loss_fn.parameters())
    assert not loss_fn.state_dict()
    assert repr(loss_fn) == "StepDPOLoss(beta=0.25, loss_type='sigmoid', label_smoothing=0.1)"
    assert LOSS_TYPES == ("sigmoid", "robust", "hinge", "ipo", "simpo", "sft")
    shown = repr(StepDPOLoss(loss_type="simpo", rpo_alpha=0.5, simpo_gamma=1.5))
    assert shown.endswith("loss_type='simpo', label_smoothing=0.0, rpo_alpha=0.5, simpo_gamma=1.5)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0"),
        ({"beta": -1.0}, "beta must be positive"),
        ({"beta": float("inf")}, "beta must be positive and finite, got inf"),
        ({"beta": float("nan")}, "beta must be positive and finite, got nan"),
        ({"loss_type": "dpo"}, "loss_type must be one of sigmoid, robust, hinge, ipo, simpo, sft, got 'dpo'"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be in"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepDPOLoss(**options)


@pytest.mark.parametrize(
    ("hidden", "labels", "refs", "message"),
    [
        ((3, 4, D), (3, 4), (3,), r"hidden must be \(2P, L, D\) and labels \(2P, L\), got \(3, 4, 6\) and \(3, 4\)"),
        ((4, D), (4,), (4,), r"hidden must be \(2P, L, D\)"),
        ((4, 3, D), (4, 2), (4,), r"got \(4, 3, 6\) and \(4, 2\)"),
        ((4, 3, D), (4, 3), (2,), r"ref_logps must be \(4,\), chosen then rejected, got \(2,\)"),
        ((4, 3, D), (4, 3), (2, 2), r"ref_logps must be \(4,\)"),
        ((4, 3, D), (4, 3), None, "ref_logps is missing: .* reference_free=True"),
        ((4, 3, D + 1), (4, 3), (4,), "with the same D"),
    ],
)
def test_bad_shapes(
    hidden: tuple[int, ...], labels: tuple[int, ...], refs: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepDPOLoss()(
            torch.ones(hidden),
            torch.ones(V, D),
            torch.zeros(labels, dtype=torch.int64),
            None if refs is None else torch.zeros(refs),
        )


def test_a_label_that_is_no_token() -> None:
    labels = torch.tensor([[-100, -1], [-100, 3]])
    with pytest.raises(ValueError, match="target holds -1, outside the vocabulary"):
        StepDPOLoss(reference_free=True)(torch.ones(2, 2, D), torch.ones(V, D), labels)


def test_bad_packed_input() -> None:
    batch = build_batch(PAIRS, range(len(PAIRS)), "tree")
    loss_fn, weight = StepDPOLoss(), torch.ones(V, D)
    with pytest.raises(ValueError, match=rf"hidden must be \({batch.num_tokens}, D\), got \(3, 6\)"):
        loss_fn.packed(torch.ones(3, D), weight, batch, torch.zeros(16))
    with pytest.raises(ValueError, match=rf"hidden must be \({batch.num_tokens}, D\)"):
        loss_fn.packed(torch.ones(1, batch.num_tokens, D), weight, batch, torch.zeros(16))
    with pytest.raises(ValueError, match=r"ref_logps must be \(16,\), chosen then rejected, got \(8,\)"):
        loss_fn.packed(torch.ones(batch.num_tokens, D), weight, batch, torch.zeros(8))
    with pytest.raises(ValueError, match="ref_logps is missing"):
        loss_fn.packed(torch.ones(batch.num_tokens, D), weight, batch)


def test_forests_of_several_trees() -> None:
    pairs = small(forest_pairs(V))
    embedding, weight = parameters()
    batch = build_batch(pairs, range(len(pairs)), "pair")
    out = StepDPOLoss(reference_free=True).packed(packed_hidden(embedding, batch), weight, batch)
    hidden, labels = padded_hidden(embedding, pairs)
    plain = StepDPOLoss(reference_free=True)(hidden, weight, labels)
    torch.testing.assert_close(out.margins, plain.margins)
