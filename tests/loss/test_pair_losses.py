"""Every type of loss and every option, padded and packed: values and gradients against formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepdpo_kernels.loss import LOSS_TYPES, StepDPOLoss
from stepdpo_kernels.loss.pair_losses import pair_losses, per_token
from stepdpo_kernels.loss.reference import step_dpo_loss
from stepdpo_kernels.packing import SHARE_MODES, build_batch
from stepdpo_kernels.types import PackedBatch, StepPair
from tests.forests import make_pair, nested_pairs, step_pairs
from tests.loss.states import V, packed_hidden, padded_hidden, parameters, small
from tests.loss.trl_loss import trl_loss

BETA = 0.7
TYPES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "conservative": {"label_smoothing": 0.2},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo"},
    "simpo, smoothed": {"loss_type": "simpo", "simpo_gamma": 1.2, "label_smoothing": 0.1},
    "sft": {"loss_type": "sft"},
}
EXTRAS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "rpo": ("rpo_alpha",),
    "weights": ("weights", "rpo_alpha"),
    "betas": ("betas",),
    "offsets": ("offsets",),
    "token weights": ("token_weights", "rpo_alpha"),
    "all": ("rpo_alpha", "weights", "betas", "offsets", "token_weights"),
}
# an empty step on either side as well
PAIRS = [*small(nested_pairs(V)), make_pair([5, 6, 7], [], [8, 9]), make_pair([5, 6, 7, 8], [], [])]
P = len(PAIRS)


def _token_weight(depth: Any, token: Any) -> Any:
    """0, 0.5, 1 or 1.5 by where a token stands and which it is, so that both layouts agree."""
    return (depth * 3 + token * 5) % 4 / 2


def _per_pair(extras: tuple[str, ...], pairs: int = P) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = {
        "betas": 0.2 + torch.rand(pairs, generator=generator, dtype=torch.float64),
        "offsets": torch.randn(pairs, generator=generator, dtype=torch.float64),
    }
    return {name: values for name, values in drawn.items() if name in extras}


def _formula(
    embedding: Tensor,
    weight: Tensor,
    refs: Tensor,
    options: dict[str, Any],
    extras: tuple[str, ...],
    per_pair: dict[str, Tensor],
    pairs: list[StepPair] = PAIRS,
) -> Tensor:
    """Mean loss, pair by pair and token by token, as the papers write it."""

    def branch(prefix: list[int], step: list[int]) -> tuple[Tensor, float]:
        total, length = torch.zeros((), dtype=torch.float64), 0.0
        for k, token in enumerate(step):
            logits = weight @ torch.tanh(embedding[[*prefix, *step[:k]]].sum(0))
            u = _token_weight(len(prefix) + k - 1, token) if "token_weights" in extras else 1.0
            total = total + u * (logits[token] - logits.exp().sum().log())
            length += u
        return total, length or 1.0

    def minus_log_sigmoid(x: Tensor) -> Tensor:
        return torch.log(1 + torch.exp(-x))

    kind, e = options.get("loss_type", "sigmoid"), options.get("label_smoothing", 0.0)
    losses = []
    for i, pair in enumerate(pairs):
        prefix = pair.prefix_ids.tolist()
        (win, n_win), (lose, n_lose) = (branch(prefix, s.tolist()) for s in (pair.chosen_ids, pair.rejected_ids))
        beta = per_pair["betas"][i] if "betas" in extras else BETA
        offset = per_pair["offsets"][i] if "offsets" in extras else 0.0
        ratio_win, ratio_lose = win - refs[i], lose - refs[len(pairs) + i]
        x = beta * (ratio_win - ratio_lose) - offset
        if kind == "sigmoid":
            loss = (1 - e) * minus_log_sigmoid(x) + e * minus_log_sigmoid(-x)
        elif kind == "robust":
            loss = ((1 - e) * minus_log_sigmoid(x) - e * minus_log_sigmoid(-x)) / (1 - 2 * e)
        elif kind == "hinge":
            loss = 1 - x if x < 1 else 0 * x
        elif kind == "ipo":
            loss = (ratio_win / n_win - ratio_lose / n_lose - 1 / (2 * beta)) ** 2
        elif kind == "sft":
            loss = -win / n_win
        else:
            x = beta * (win / n_win - lose / n_lose) - options.get("simpo_gamma", 0.5) - offset
            loss = (1 - e) * minus_log_sigmoid(x) + e * minus_log_sigmoid(-x)
        if "rpo_alpha" in extras:
            loss = loss - 0.3 * win / n_win
        losses.append(loss * (pair.weight if "weights" in extras else 1.0))
    return torch.stack(losses).mean()


def _cases() -> list[Any]:
    return [
        pytest.param(kind, extra, id=f"{kind}-{extra}")
        for kind in TYPES
        for extra in EXTRAS
        if not (kind in ("ipo", "sft") and extra == "offsets")
    ]


def _setting(kind: str, extra: str) -> tuple[dict[str, Any], tuple[str, ...], StepDPOLoss]:
    extras = tuple(name for name in EXTRAS[extra] if not (kind in ("ipo", "sft") and name == "offsets"))
    alpha = {"rpo_alpha": 0.3} if "rpo_alpha" in extras else {}
    return TYPES[kind], extras, StepDPOLoss(BETA, **TYPES[kind], **alpha)


def _refs_near(embedding: Tensor, weight: Tensor, pairs: list[StepPair] = PAIRS) -> Tensor:
    """Margins of either sign, and no branch far from its reference."""
    hidden, labels = padded_hidden(embedding, pairs)
    out = StepDPOLoss(reference_free=True)(hidden, weight, labels)
    return torch.cat([out.chosen_logps, out.rejected_logps]) + torch.randn(2 * len(pairs)).double()


@pytest.mark.parametrize(("kind", "extra"), _cases())
def test_padded(kind: str, extra: str) -> None:
    options, extras, loss_fn = _setting(kind, extra)
    embedding, weight = parameters()
    refs, per_pair = _refs_near(embedding, weight), _per_pair(extras)
    hidden, labels = padded_hidden(embedding, PAIRS)
    arguments: dict[str, Any] = dict(per_pair)
    if "weights" in extras:
        arguments["weights"] = torch.tensor([p.weight for p in PAIRS])
    if "token_weights" in extras:
        token_weights = _token_weight(torch.arange(labels.shape[1]), labels).double()
        arguments["token_weights"] = token_weights.masked_fill(labels == -100, float("nan"))  # nobody reads it
    given = None if loss_fn.reference_free else refs
    out = loss_fn(hidden, weight, labels, given, **arguments)
    formula = _formula(embedding, weight, refs, options, extras, per_pair)
    if "token_weights" in extras:
        arguments["token_weights"] = token_weights.masked_fill(labels == -100, 0)
    alpha = loss_fn.rpo_alpha
    twin = step_dpo_loss(hidden @ weight.T, labels, given, beta=BETA, rpo_alpha=alpha, **options, **arguments)
    gradients = torch.autograd.grad(out.loss, [embedding, weight, hidden], retain_graph=True)
    for loss, wanted in ((formula, [embedding, weight]), (twin, [embedding, weight, hidden])):
        torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)
        expected = torch.autograd.grad(loss, wanted, retain_graph=True)
        torch.testing.assert_close(gradients[: len(wanted)], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("kind", "extra"), _cases())
def test_packed(kind: str, extra: str) -> None:
    options, extras, loss_fn = _setting(kind, extra)
    if "weights" not in extras:
        extras = (*extras, "weights")  # a batch always has them
    embedding, weight = parameters()
    refs, per_pair = _refs_near(embedding, weight), _per_pair(extras)
    formula = _formula(embedding, weight, refs, options, extras, per_pair)
    expected = torch.autograd.grad(formula, [embedding, weight])
    for share in SHARE_MODES:
        batch = build_batch(PAIRS, range(P), share)
        token_weights = None
        if "token_weights" in extras:
            token_weights = _token_weight(batch.position_ids[batch.rows.index], batch.targets)
        given = None if loss_fn.reference_free else refs
        states = packed_hidden(embedding, batch)
        out = loss_fn.packed(states, weight, batch, given, token_weights=token_weights, **per_pair)
        torch.testing.assert_close(out.loss, formula, rtol=1e-10, atol=0)
        gradients = torch.autograd.grad(out.loss, [embedding, weight])
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(step_pairs(), st.sampled_from(SHARE_MODES), st.sampled_from(sorted(TYPES)))
def test_any_forest(pairs: list[StepPair], share: str, kind: str) -> None:
    torch.manual_seed(0)
    pairs = small(pairs)
    embedding, weight = parameters()
    loss_fn = StepDPOLoss(BETA, rpo_alpha=0.2, **TYPES[kind])
    refs = None if loss_fn.reference_free else _refs_near(embedding, weight, pairs)
    batch = build_batch(pairs, range(len(pairs)), share)
    out = loss_fn.packed(packed_hidden(embedding, batch), weight, batch, refs)
    hidden, labels = padded_hidden(embedding, pairs)
    options = {"rpo_alpha": 0.2, "weights": batch.weights.double(), **TYPES[kind]}
    expected = step_dpo_loss(hidden @ weight.T, labels, refs, beta=BETA, **options)
    torch.testing.assert_close(out.loss, expected)
    gradients = torch.autograd.grad(out.loss, [embedding, weight])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [embedding, weight]))


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("sigmoid", math.log(2)),
        ("conservative", math.log(2)),
        ("robust", math.log(2)),
        ("hinge", 1.0),
        ("ipo", (1 / (2 * BETA)) ** 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_weights_give_margins_of_exactly_zero(kind: str, loss: float, dtype: torch.dtype) -> None:
    embedding, weight = (p.detach().to(dtype).requires_grad_() for p in parameters(torch.float32))
    batch = build_batch(PAIRS, range(P), "tree")
    loss_fn = StepDPOLoss(BETA, **TYPES[kind])
    hidden = packed_hidden(embedding, batch)
    token_weights = torch.rand(batch.num_rows)
    for options in ({}, {"token_weights": token_weights}):
        refs = loss_fn.packed_logps(hidden, weight, batch, **options)
        out = loss_fn.packed(hidden, weight, batch, refs, **options)
        assert out.margins.tolist() == out.chosen_rewards.tolist() == [0.0] * P
        assert out.loss.item() == pytest.approx(loss * batch.weights.mean().item(), rel=1e-6)
    betas = torch.rand(P) + 0.1
    assert loss_fn.packed(hidden, weight, batch, refs, betas=betas, token_weights=token_weights).margins.any() == 0


def test_rewards_are_what_the_loss_sees() -> None:
    embedding, weight = parameters()
    refs = _refs_near(embedding, weight)
    batch = build_batch(PAIRS, range(P), "tree")
    hidden = packed_hidden(embedding, batch)
    lengths = torch.tensor([p.chosen_ids.size for p in PAIRS] + [p.rejected_ids.size for p in PAIRS]).clamp(min=1)
    betas = _per_pair(("betas",))["betas"]
    for kind, options in TYPES.items():
        loss_fn = StepDPOLoss(BETA, **options)
        ratios = loss_fn.packed_logps(hidden, weight, batch) - (0 if loss_fn.reference_free else refs)
        if kind.startswith(("ipo", "simpo")):
            ratios = ratios / lengths
        given = None if loss_fn.reference_free else refs
        for beta, arguments in ((BETA, {}), (betas.repeat(2), {"betas": betas})):
            out = loss_fn.packed(hidden, weight, batch, given, **arguments)
            torch.testing.assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]), beta * ratios)
            assert torch.equal(out.margins, out.chosen_rewards - out.rejected_rewards)
            assert torch.equal(out.accuracy, (out.margins > 0).float())


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "sft"])
def test_empty_branches(kind: str) -> None:
    """An empty branch is a log-prob of 0, per token as well, and takes no part in a gradient."""
    loss_fn = StepDPOLoss(BETA, rpo_alpha=0.5, **TYPES[kind])
    nothing = torch.zeros(1, dtype=torch.float64)
    of_nothing = pair_losses(loss_fn.loss_type, nothing, beta=BETA, **_without_type(kind)).item()
    for chosen, rejected in (([], [3, 4]), ([3, 4], []), ([], [])):
        pair = make_pair([1, 2], chosen, rejected)
        embedding, weight = parameters()
        batch = build_batch([pair], [0], "tree")
        refs = None if loss_fn.reference_free else torch.zeros(2)
        packed = loss_fn.packed(packed_hidden(embedding, batch), weight, batch, refs)
        hidden, labels = padded_hidden(embedding, [pair])
        padded = loss_fn(hidden, weight, labels, refs)
        torch.testing.assert_close(packed.loss, padded.loss)
        for out in (packed, padded):
            gradients = torch.autograd.grad(out.loss, [embedding, weight])
            assert all(g.isfinite().all() for g in gradients)
            met = kind == "hinge" and not chosen  # a margin beyond 1 already
            assert any(g.any() for g in gradients) == bool((chosen or rejected) and not met)
            assert (out.chosen_rewards.item() == 0) == (not chosen)
            if not chosen and not rejected:
                assert out.loss.item() == pytest.approx(of_nothing, rel=1e-12)


def _without_type(kind: str) -> dict[str, Any]:
    return {name: value for name, value in TYPES[kind].items() if name != "loss_type"}


@pytest.mark.parametrize("kind", TYPES)
def test_a_token_of_weight_0_is_no_label_and_one_of_weight_2_counts_twice(kind: str) -> None:
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS)
    loss_fn = StepDPOLoss(BETA, rpo_alpha=0.5, **TYPES[kind])
    refs = None if loss_fn.reference_free else torch.randn(2 * P).double()
    counts = torch.randint(3, labels.shape)
    out = loss_fn(hidden, weight, labels, refs, token_weights=counts)
    # each state and label as often as it counts
    repeated = torch.cat([hidden, hidden], dim=1)
    again = torch.cat([labels.masked_fill(counts < 1, -100), labels.masked_fill(counts < 2, -100)], dim=1)
    expected = loss_fn(repeated, weight, again, refs)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.chosen_logps, expected.chosen_logps)
    gradients = torch.autograd.grad(out.loss, [embedding, weight], retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.loss, [embedding, weight]))
    # the weights themselves get no gradient
    learned = counts.double().requires_grad_()
    loss = loss_fn(hidden.detach(), weight, labels, refs, token_weights=learned).loss
    assert torch.autograd.grad(loss, [weight, learned], allow_unused=True)[1] is None


def test_robust_is_unbiased() -> None:
    """A share e of preferences the wrong way round leaves its mean where the clean sigmoid loss is."""
    margins, e = torch.linspace(-30, 30, 61, dtype=torch.float64), 0.3
    right, wrong = (pair_losses("robust", m, beta=1.0, label_smoothing=e) for m in (margins, -margins))
    clean = pair_losses("sigmoid", margins, beta=1.0)
    torch.testing.assert_close((1 - e) * right + e * wrong, clean)
    assert right.min() < -10  # as documented


def test_values_by_hand() -> None:
    x = torch.tensor([2.0, -1.0], dtype=torch.float64)
    minus_log_sigmoid = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
    other_way = [m + v for m, v in zip(minus_log_sigmoid, (2, -1), strict=True)]
    expected = {
        "sigmoid": minus_log_sigmoid,
        "hinge": [0.0, 2.0],
        "ipo": [(2 / 0.5 - 1) ** 2, (-1 / 0.5 - 1) ** 2],
        "simpo": [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))],
    }
    for loss_type, values in expected.items():
        assert pair_losses(loss_type, x, beta=0.5).tolist() == pytest.approx(values)
    smoothed = [0.9 * a + 0.1 * b for a, b in zip(minus_log_sigmoid, other_way, strict=True)]
    assert pair_losses("sigmoid", x, beta=0.5, label_smoothing=0.1).tolist() == pytest.approx(smoothed)
    robust = [(0.9 * a - 0.1 * b) / 0.8 for a, b in zip(minus_log_sigmoid, other_way, strict=True)]
    assert pair_losses("robust", x, beta=0.5, label_smoothing=0.1).tolist() == pytest.approx(robust)
    # where an offset is met, a hinge asks for nothing and a sigmoid for log 2
    offsets = torch.tensor([2.0, -2.0], dtype=torch.float64)
    assert pair_losses("hinge", x, beta=0.5, offsets=offsets).tolist() == [1.0, 0.0]
    assert pair_losses("sigmoid", x, beta=0.5, offsets=offsets)[0].item() == pytest.approx(math.log(2))


def test_gradients_far_from_zero() -> None:
    for loss_type in (kind for kind in LOSS_TYPES if kind != "sft"):
        margins = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
        e = 0.1 if loss_type == "robust" else 0.0
        losses = pair_losses(loss_type, margins, beta=0.4, label_smoothing=e)
        (gradient,) = torch.autograd.grad(losses.sum(), margins)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient[0] < -0.9


# ---- beside TRL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
def test_dpo_trainer_of_trl_computes_the_same(kind: str) -> None:
    pytest.importorskip("trl")
    pairs = [pair for pair in PAIRS if pair.chosen_ids.size and pair.rejected_ids.size]
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, pairs)
    refs = _refs_near(embedding, weight, pairs)
    keep = labels != -100
    token_logps = torch.log_softmax(hidden @ weight.T, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    e = TYPES[kind].get("label_smoothing", 0.0)
    theirs = trl_loss([kind], token_logps, keep, refs, beta=BETA, label_smoothing=e)
    ours = StepDPOLoss(BETA, **TYPES[kind])(hidden, weight, labels, refs).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(ours, [embedding, weight], retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, [embedding, weight]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["simpo", "simpo, smoothed"])
def test_simpo_of_trl_computes_the_same(kind: str) -> None:
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer

    options = TYPES[kind]
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS[:6])
    out = StepDPOLoss(BETA, **options)(hidden, weight, labels)
    lengths = (labels != -100).sum(dim=1)
    average = torch.cat([out.chosen_logps, out.rejected_logps]) / lengths
    trainer = SimpleNamespace(
        loss_type="simpo",
        alpha=0.0,
        beta=BETA,
        simpo_gamma=options.get("simpo_gamma", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *average.chunk(2))
    torch.testing.assert_close(out.loss, losses.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(out.rejected_rewards, rejected_rewards)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "robust"}, "loss_type 'robust' needs label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "loss_type 'ipo' has no label_smoothing, got 0.1"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "loss_type 'hinge' has no label_smoothing, got 0.1"),
        ({"simpo_gamma": 0.5}, "simpo_gamma is for loss_type 'simpo', got 0.5 with 'sigmoid'"),
        ({"loss_type": "ipo", "simpo_gamma": 0.0}, "simpo_gamma is for loss_type 'simpo', got 0.0 with 'ipo'"),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma must be finite and >= 0, got -1.0"),
        ({"loss_type": "simpo", "simpo_gamma": float("nan")}, "simpo_gamma must be finite"),
        ({"rpo_alpha": -0.1}, "rpo_alpha must be finite and >= 0, got -0.1"),
        ({"rpo_alpha": float("inf")}, "rpo_alpha must be finite and >= 0, got inf"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepDPOLoss(**options)


def _call(layout: str, loss_fn: StepDPOLoss, refs: Tensor | None, **arguments: Any) -> Any:
    embedding, weight = parameters()
    if layout == "packed":
        batch: PackedBatch = build_batch(PAIRS, range(P), "tree")
        return loss_fn.packed(packed_hidden(embedding, batch), weight, batch, refs, **arguments)
    hidden, labels = padded_hidden(embedding, PAIRS)
    return loss_fn(hidden, weight, labels, refs, **arguments)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_arguments_that_do_not_fit(layout: str) -> None:
    refs = torch.zeros(2 * P)
    for name in ("betas", "offsets", *(["weights"] if layout == "padded" else [])):
        with pytest.raises(ValueError, match=rf"{name} must be \({P},\), one for each pair, got \(3,\)"):
            _call(layout, StepDPOLoss(), refs, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match=r"token_weights must be \(.*\), got \(3,\)"):
        _call(layout, StepDPOLoss(), refs, token_weights=torch.ones(3))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        betas = torch.ones(P)
        betas[2] = bad
        with pytest.raises(ValueError, match="betas must be positive and finite, got"):
            _call(layout, StepDPOLoss(), refs, betas=betas)
    with pytest.raises(ValueError, match="offsets: 'ipo' has a target margin of its own"):
        _call(layout, StepDPOLoss(loss_type="ipo"), refs, offsets=torch.ones(P))
    with pytest.raises(ValueError, match="loss_type 'simpo' has no reference: leave ref_logps out"):
        _call(layout, StepDPOLoss(loss_type="simpo"), refs)
    with pytest.raises(ValueError, match="ref_logps is missing"):
        _call(layout, StepDPOLoss(loss_type="ipo"), None)
    with pytest.raises(ValueError, match="no loss_type 'dpo'"):
        step_dpo_loss(torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.int64), loss_type="dpo")


def test_token_weights_leave_float32() -> None:
    lengths = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert per_token(torch.ones(2), lengths).dtype == torch.float32
