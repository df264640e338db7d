"""I1 in bfloat16, for every family: packed gradients are as near to float32 as the unpacked model's.

Each may be off by at most twice as much, plus rounding once; all together, without that. By default whole trees in a
full fine-tune; `make slow` adds trees of single pairs, gradient checkpointing and LoRA.

Experts are chosen by comparing scores. A token whose scores nearly tie goes to other experts after rounding, packed or
unpacked as luck will have it, and one such token can outweigh the rounding of all others. So weights are drawn until
neither way sends a token to other experts than float32 does; the errors of the draw have no say in that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.packing.reference import padded_batch
from tests.exactness import Step, errors, family_model, packed_step, plain_step, references_near
from tests.families import FAMILIES
from tests.forests import forest_pairs

Make = Callable[..., PreTrainedModel]
EPS = torch.finfo(torch.bfloat16).eps / 2
WAYS = [
    pytest.param(training, share, marks=[] if (training, share) == ("full", "tree") else [pytest.mark.slow])
    for share in ("tree", "pair")
    for training in ("full", "checkpointing", "lora", "lora and checkpointing")
]
WITH_EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
DRAWS = 20


@contextmanager
def _routes(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Fills a list with (tokens, k) the experts of each token, for each call of a layer's experts."""
    seen: list[Tensor] = []

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (chosen,) = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.int64)
        seen.append(chosen.flatten(0, -2).sort(-1).values)

    hooks = [
        module.register_forward_pre_hook(see, with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith(".mlp.experts")
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def _total(step: Step, exact: Step) -> float:
    """Relative error of all gradients as one vector."""
    ours, theirs = (torch.cat([s.gradients[n].double().flatten() for n in exact.gradients]) for s in (step, exact))
    return ((ours - theirs).norm() / theirs.norm()).item()


def _three_steps(tiny_model: Make, kind: str, training: str, share: str, seed: int) -> tuple[list[Step], bool]:
    """Packed and unpacked in bfloat16, unpacked in float32; and whether all send every token to the same experts."""

    def model(dtype: torch.dtype) -> PreTrainedModel:
        # rounded first, adapters too, so that all have the same weights
        made = family_model(tiny_model, kind, training, dtype=torch.bfloat16, seed=seed)
        return made.to(torch.bfloat16).to(dtype)

    pairs = forest_pairs()
    refs = references_near(model(torch.float32), pairs)
    (batch,) = pack_pairs(pairs, 10_000, share=share)
    real = padded_batch(pairs)["attention_mask"].flatten().bool()
    steps: dict[tuple[bool, torch.dtype], Step] = {}
    routes: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for packed in (True, False):
            made = model(dtype)
            with _routes(made) as seen:
                if packed:
                    steps[packed, dtype] = packed_step(made, [batch], refs, num_pairs=len(pairs))
                else:
                    steps[packed, dtype] = plain_step(made, pairs, refs)
            routes[packed, dtype] = seen if packed else [chosen[real] for chosen in seen]
    alike = True
    for packed in (True, False):
        rounded, exact = (routes[packed, dtype] for dtype in (torch.bfloat16, torch.float32))
        assert len(rounded) == len(exact)
        assert bool(exact) == (kind in WITH_EXPERTS)
        alike &= all(map(torch.equal, rounded, exact))
    return [steps[True, torch.bfloat16], steps[False, torch.bfloat16], steps[False, torch.float32]], alike


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("training", "share"), WAYS)
def test_bfloat16_is_as_near_to_float32_as_the_unpacked_model(
    tiny_model: Make, kind: str, training: str, share: str, record_property: Callable[[str, float], None]
) -> None:
    draws = (_three_steps(tiny_model, kind, training, share, seed) for seed in range(DRAWS))
    steps = next((steps for steps, alike in draws if alike), None)
    assert steps is not None, "every draw has a token whose experts depend on rounding"
    packed, plain, exact = steps
    assert {g.dtype for step in (packed, plain) for g in step.gradients.values()} == {torch.bfloat16}
    of_packed, of_plain = errors(packed, exact), errors(plain, exact)
    for name, error in of_packed.items():
        assert error <= 2 * (of_plain[name] + EPS), name
    ratio = _total(packed, exact) / _total(plain, exact)
    record_property("error by that of the unpacked model", ratio)
    assert ratio <= 2
