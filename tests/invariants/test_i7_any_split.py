"""I7, any split: an optimiser step's gradient does not depend on how its pairs were divided.

Into bins of any budget, sharing or not, accumulated in any order, spread over ranks: the sum of the parts is the whole,
because each part is divided by the number of pairs of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels.packing import SHARE_MODES, build_batch, pack_pairs, tokens_of_pair
from stepdpo_kernels.types import PackedBatch, StepPair
from tests.exactness import Step, assert_exact, packed_step, plain_step, references_near, worst
from tests.forests import forest_pairs

Make = Callable[..., PreTrainedModel]
PAIRS = forest_pairs()
N = len(PAIRS)


@pytest.fixture(scope="module")
def plain(tiny_model: Make) -> tuple[Tensor, Step]:
    """Reference log-probs, and the step of all pairs at once by the plain model."""
    refs = references_near(tiny_model("qwen2"), PAIRS)
    return refs, plain_step(tiny_model("qwen2"), PAIRS, refs)


def _step(tiny_model: Make, batches: list[PackedBatch], refs: Tensor, num_pairs: int = N) -> Step:
    return packed_step(tiny_model("qwen2"), batches, refs, num_pairs=num_pairs)


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("budget", ["least", "middle", "everything"])
def test_bins_of_any_budget(tiny_model: Make, plain: tuple[Tensor, Step], share: str, budget: str) -> None:
    refs, whole = plain
    least = max(tokens_of_pair(pair, share) for pair in PAIRS)
    tokens = {"least": least, "middle": 2 * least, "everything": 10_000}[budget]
    batches = pack_pairs(PAIRS, tokens, share=share)
    assert (len(batches) == 1) == (budget == "everything")
    assert_exact(_step(tiny_model, batches, refs), whole)


@pytest.mark.parametrize("share", SHARE_MODES)
def test_one_pair_at_a_time_in_any_order(tiny_model: Make, plain: tuple[Tensor, Step], share: str) -> None:
    refs, whole = plain
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3)).tolist()
    assert_exact(_step(tiny_model, [build_batch(PAIRS, [i], share) for i in order], refs), whole)


def test_different_sharing_in_one_step(tiny_model: Make, plain: tuple[Tensor, Step]) -> None:
    refs, whole = plain
    batches = [
        build_batch(PAIRS, [12, 0, 3, 7], "tree"),
        build_batch(PAIRS, [1, 2], "none"),
        build_batch(PAIRS, [11, 10, 9, 8, 6, 5, 4], "pair"),
    ]
    assert_exact(_step(tiny_model, batches, refs), whole)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_average_their_gradients(tiny_model: Make, plain: tuple[Tensor, Step], ranks: int) -> None:
    # DDP divides the sum of the ranks' gradients by their number, so each divides by its share of all pairs.
    refs, whole = plain
    model = tiny_model("qwen2")
    steps = [
        packed_step(model, _of_rank(PAIRS, rank, ranks), refs, num_pairs=N)  # rank's own sum over N
        for rank in range(ranks)
    ]
    total = Step(
        sum(step.loss for step in steps),
        {name: torch.stack([step.gradients[name] for step in steps]).sum(0) for name in steps[0].gradients},
    )
    assert_exact(total, whole)


def _of_rank(pairs: list[StepPair], rank: int, ranks: int) -> list[PackedBatch]:
    mine = list(range(rank, len(pairs), ranks))
    return [build_batch(pairs, mine[:2], "tree"), build_batch(pairs, mine[2:], "tree")]


def test_dividing_by_each_parts_own_pairs_is_noticed(tiny_model: Make, plain: tuple[Tensor, Step]) -> None:
    # what averaging the means of unequal bins would give
    refs, whole = plain
    from stepdpo_kernels.loss import StepDPOLoss
    from stepdpo_kernels.model import packed_forward

    model = tiny_model("qwen2")
    batches = [build_batch(PAIRS, range(2), "tree"), build_batch(PAIRS, range(2, N), "tree")]
    for batch in batches:
        order = torch.cat([batch.pair_index, N + batch.pair_index])
        out = StepDPOLoss().packed(packed_forward(model, batch), model.lm_head.weight, batch, refs[order])
        (out.loss / len(batches)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(Step(whole.loss, gradients), whole)[0] > 1e-2
