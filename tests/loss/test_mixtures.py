"""Several types of loss in one: sums of what each type gives alone, in one pass over the same log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.loss.reference import step_dpo_loss
from stepdpo_kernels.packing import SHARE_MODES, build_batch, pack_pairs
from stepdpo_kernels.types import StepPair
from tests.forests import make_pair, nested_pairs
from tests.loss.states import V, packed_hidden, padded_hidden, parameters, small
from tests.loss.trl_loss import trl_loss

BETA, E, GAMMA = 0.7, 0.2, 0.9
MIXTURES: list[tuple[list[str], list[float] | None]] = [
    (["sigmoid", "sft"], [1.0, 0.3]),
    (["sigmoid", "hinge", "sft"], [0.25, 0.75, 2.0]),
    (["ipo", "sigmoid"], None),
    (["simpo", "sft"], [0.5, 0.5]),
    (["sft", "ipo", "simpo", "robust", "hinge", "sigmoid"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    (["hinge", "sigmoid"], [1.0, 0.0]),
]
# an empty step on either side as well
PAIRS = [*small(nested_pairs(V)), make_pair([5, 6, 7], [], [8, 9]), make_pair([5, 6, 7, 8], [], [])]
P = len(PAIRS)


def _options(types: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"label_smoothing": E} if {"sigmoid", "robust", "simpo"} & {*types} else {}
    return options | ({"simpo_gamma": GAMMA} if "simpo" in types else {})


def _refs(embedding: Tensor, weight: Tensor, pairs: list[StepPair] = PAIRS) -> Tensor:
    """Margins of either sign, and no branch far from its reference."""
    hidden, labels = padded_hidden(embedding, pairs)
    out = StepDPOLoss(reference_free=True)(hidden, weight, labels)
    return torch.cat([out.chosen_logps, out.rejected_logps]) + torch.randn(2 * len(pairs)).double()


def _expected(
    mixture: tuple[list[str], list[float] | None], embedding: Tensor, weight: Tensor, refs: Tensor, **arguments: Any
) -> Tensor:
    """Each type's formula from full logits on its own, times its weight."""
    types, factors = mixture
    hidden, labels = padded_hidden(embedding, PAIRS)
    options = {"beta": BETA, "label_smoothing": E, "simpo_gamma": GAMMA, **arguments}
    alone = (step_dpo_loss(hidden @ weight.T, labels, refs, loss_type=kind, **options) for kind in types)
    return torch.stack([w * loss for w, loss in zip(factors or [1.0] * len(types), alone, strict=True)]).sum()


def _per_pair(types: Sequence[str]) -> dict[str, Tensor]:
    values = {"betas": 0.2 + torch.rand(P).double(), "offsets": torch.randn(P).double()}
    return {name: value for name, value in values.items() if not (name == "offsets" and "ipo" in types)}


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["plain", "betas and offsets"])
def test_a_mixture_is_the_weighted_sum_of_its_types(mixture: Any, own: bool) -> None:
    types, factors = mixture
    embedding, weight = parameters()
    refs, per_pair = _refs(embedding, weight), _per_pair(types) if own else {}
    loss_fn = StepDPOLoss(BETA, types, loss_weights=factors, **_options(types))
    given = None if loss_fn.reference_free else refs
    assert loss_fn.reference_free == (types == ["simpo", "sft"])
    pair_weights = torch.tensor([p.weight for p in PAIRS]).double()
    expected = _expected(mixture, embedding, weight, refs, weights=pair_weights, **per_pair)
    wanted = torch.autograd.grad(expected, [embedding, weight])
    hidden, labels = padded_hidden(embedding, PAIRS)
    found = [loss_fn(hidden, weight, labels, given, weights=pair_weights, **per_pair)]
    for share in SHARE_MODES:
        batch = build_batch(PAIRS, range(P), share)
        found.append(loss_fn.packed(packed_hidden(embedding, batch), weight, batch, given, **per_pair))
    for out in found:
        torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.autograd.grad(out.loss, [embedding, weight]), wanted, rtol=1e-8, atol=1e-12)


def test_a_mixture_with_weights_of_tokens() -> None:
    embedding, weight = parameters()
    refs = _refs(embedding, weight)
    hidden, labels = padded_hidden(embedding, PAIRS)
    token_weights = torch.rand(labels.shape).double()
    mixture: Any = (["sigmoid", "ipo", "sft"], [1.0, 0.5, 0.25])
    out = StepDPOLoss(BETA, mixture[0], E, loss_weights=mixture[1])(
        hidden, weight, labels, refs, token_weights=token_weights
    )
    expected = _expected(mixture, embedding, weight, refs, token_weights=token_weights)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo", "simpo", "sft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_list_of_one_is_that_type_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    embedding, weight = parameters(dtype)
    refs = _refs(embedding, weight).to(dtype)
    batch = build_batch(PAIRS, range(P), "tree")
    results = []
    for loss_type, factors in ((kind, None), ([kind], None), ((kind,), [1.0])):
        loss_fn = StepDPOLoss(BETA, loss_type, loss_weights=factors, **_options([kind]))
        given = None if loss_fn.reference_free else refs
        out = loss_fn.packed(packed_hidden(embedding, batch), weight, batch, given)
        results.append([out.loss, out.margins, *torch.autograd.grad(out.loss, [embedding, weight])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sigmoid_with_sft_is_rpo_and_keeps_the_bits_of_sigmoid() -> None:
    embedding, weight = parameters(torch.float32)
    refs = _refs(embedding, weight).float()
    batch = build_batch(PAIRS, range(P), "tree")
    hidden = packed_hidden(embedding, batch)
    mixed = StepDPOLoss(BETA, ["sft", "sigmoid"], loss_weights=[0.3, 1.0]).packed(hidden, weight, batch, refs)
    rpo = StepDPOLoss(BETA, rpo_alpha=0.3).packed(hidden, weight, batch, refs)
    plain = StepDPOLoss(BETA).packed(hidden, weight, batch, refs)
    torch.testing.assert_close(mixed.loss, rpo.loss, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(mixed.loss, [embedding, weight], retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(rpo.loss, [embedding, weight], retain_graph=True))
    for name in ("margins", "chosen_rewards", "rejected_rewards", "chosen_logps", "accuracy"):
        assert torch.equal(getattr(mixed, name), getattr(plain, name))


@pytest.mark.parametrize("mixture", [m for m in MIXTURES if m[0] != ["simpo", "sft"]], ids=str)
def test_equal_weights_give_margins_of_exactly_zero(mixture: Any) -> None:
    """I2, also where the first type is per token; nothing but "sft" and "simpo" differs from its value at 0."""
    types, factors = mixture
    embedding, weight = parameters(torch.float32)
    batch = build_batch(PAIRS, range(P), "tree")
    hidden = packed_hidden(embedding, batch)
    loss_fn = StepDPOLoss(BETA, types, loss_weights=factors, **_options(types))
    out = loss_fn.packed(hidden, weight, batch, loss_fn.packed_logps(hidden, weight, batch))
    assert out.margins.tolist() == out.chosen_rewards.tolist() == [0.0] * P


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_parts_of_a_step_add_up(mixture: Any) -> None:
    """I7: bins of any size give the loss and the gradient of the whole."""
    types, factors = mixture
    embedding, weight = parameters()
    refs = _refs(embedding, weight)
    loss_fn = StepDPOLoss(BETA, types, loss_weights=factors, **_options(types))

    def total(max_tokens: int) -> tuple[int, Tensor, tuple[Tensor, ...]]:
        losses = []
        batches = pack_pairs(PAIRS, max_tokens)
        for batch in batches:
            given = None if loss_fn.reference_free else refs.view(2, P)[:, batch.pair_index].reshape(-1)
            losses.append(loss_fn.packed(packed_hidden(embedding, batch), weight, batch, given, num_pairs=P).loss)
        loss = torch.stack(losses).sum()
        return len(batches), loss, torch.autograd.grad(loss, [embedding, weight])

    (one, loss, gradients), (several, again, others) = total(10_000), total(45)
    assert one == 1
    assert several > 1
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(others, gradients, rtol=1e-9, atol=1e-13)


# ---- beside TRL -----------------------------------------------------------------------------------------------------


def _steps(lengths: Sequence[tuple[int, int]]) -> list[StepPair]:
    """Pairs with steps of these lengths."""
    return [
        make_pair(
            torch.randint(V, (5,)).tolist(), torch.randint(V, (n,)).tolist(), torch.randint(V, (m,)).tolist(), id=str(i)
        )
        for i, (n, m) in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("types", "factors"),
    [(["sft"], [1.0]), (["robust", "sft"], [0.5, 0.2]), (["sft", "ipo", "hinge", "robust"], [0.1, 0.2, 0.3, 0.4])],
    ids=str,
)
def test_trl_computes_the_same_mixture(types: list[str], factors: list[float]) -> None:
    """Chosen steps of one length, for "sft"; TRL's "sigmoid" knows no label smoothing, its "robust" does."""
    pytest.importorskip("trl")
    embedding, weight = parameters()
    pairs = _steps([(4, 2), (4, 6), (4, 4)])
    hidden, labels = padded_hidden(embedding, pairs)
    keep, refs = labels != -100, _refs(embedding, weight, pairs)
    token_logps = torch.log_softmax(hidden @ weight.T, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    loss_fn = StepDPOLoss(BETA, types, loss_weights=factors, **_options(types))
    ours = loss_fn(hidden, weight, labels, None if loss_fn.reference_free else refs).loss
    theirs = trl_loss(types, token_logps, keep, refs, beta=BETA, label_smoothing=E, loss_weights=factors)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(ours, [embedding, weight], retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, [embedding, weight]), rtol=1e-8, atol=1e-12)


def test_where_sft_is_not_that_of_trl() -> None:
    """Chosen steps of several lengths: the mean of means here, the mean over all tokens there."""
    pytest.importorskip("trl")
    embedding, weight = parameters()
    pairs = _steps([(1, 2), (6, 3)])
    hidden, labels = padded_hidden(embedding, pairs)
    keep = labels != -100
    token_logps = torch.log_softmax(hidden @ weight.T, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    short, long = (-token_logps[i][keep[i]] for i in range(2))
    theirs = trl_loss(["sft"], token_logps, keep, torch.zeros(4), beta=BETA)
    torch.testing.assert_close(theirs, torch.cat([short, long]).mean())
    ours = StepDPOLoss(BETA, "sft")(hidden, weight, labels).loss
    torch.testing.assert_close(ours, (short.mean() + long.mean()) / 2)


# ---- what is refused, and what is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": []}, r"loss_type must name at least one of sigmoid, robust, .*, sft, got \[\]"),
        ({"loss_type": ["sigmoid", "dpo"]}, "loss_type must be one of .*, got 'dpo'"),
        ({"loss_type": None}, "loss_type must be one of .*, got None"),
        ({"loss_type": ["sft", "sft"]}, r"loss_type names 'sft' twice, got \['sft', 'sft'\]: give it one weight"),
        ({"loss_weights": [1.0, 2.0]}, r"loss_weights must be one number for each loss_type of \['sigmoid'\], got \[1"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": []}, r"loss_weights must be one number .*, got \[\]"),
        ({"loss_weights": 0.5}, "loss_weights must be one number .*, got 0.5"),
        ({"loss_weights": [-0.5]}, "loss_weights must be finite and >= 0, got -0.5 for loss_type 'sigmoid'"),
        ({"loss_weights": [float("nan")]}, "loss_weights must be finite and >= 0, got nan"),
        ({"loss_weights": [float("inf")]}, "loss_weights must be finite and >= 0, got inf"),
        ({"loss_weights": ["1"]}, "loss_weights must be finite and >= 0, got '1'"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [0, 0]}, r"loss_weights must not all be 0, got \[0, 0\]"),
        ({"loss_type": ["sft", "robust"]}, "loss_type 'robust' needs label_smoothing"),
        (
            {"loss_type": ["hinge", "sft"], "label_smoothing": 0.1},
            r"\['hinge', 'sft'\] has no label_smoothing, got 0.1",
        ),
        (
            {"loss_type": ["sigmoid", "sft"], "simpo_gamma": 1.0},
            r"simpo_gamma is for .* got 1.0 with \['sigmoid', 'sft'",
        ),
    ],
)
def test_mixtures_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepDPOLoss(**options)


def test_arguments_that_do_not_fit() -> None:
    embedding, weight = parameters()
    hidden, labels = padded_hidden(embedding, PAIRS)
    refs = torch.zeros(2 * P)
    with pytest.raises(ValueError, match="offsets: 'ipo' has a target margin of its own"):
        StepDPOLoss(loss_type=["sigmoid", "ipo"])(hidden, weight, labels, refs, offsets=torch.ones(P))
    with pytest.raises(ValueError, match="offsets: 'sft' has no margin"):
        StepDPOLoss(loss_type="sft")(hidden, weight, labels, offsets=torch.ones(P))
    with pytest.raises(ValueError, match=r"loss_type \['simpo', 'sft'\] has no reference: leave ref_logps out"):
        StepDPOLoss(loss_type=["simpo", "sft"])(hidden, weight, labels, refs)
    with pytest.raises(ValueError, match="ref_logps is missing"):
        StepDPOLoss(loss_type=["sft", "sigmoid"])(hidden, weight, labels)


def test_what_a_mixture_shows() -> None:
    shown = repr(StepDPOLoss(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]))
    assert shown.endswith("loss_type=['sigmoid', 'sft'], label_smoothing=0.0, loss_weights=[1.0, 0.2])")
