"""Every provider of the suites attention and step is right, and what is wrong is caught."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import lengths, registry
from benchmarks.runner import Context
from benchmarks.suites import attention, step
from benchmarks.suites.attention import providers as attention_providers
from benchmarks.suites.attention import task as attention_task
from benchmarks.suites.attention.layouts import Forest
from benchmarks.suites.step import task as models
from benchmarks.suites.step import trainers
from benchmarks.suites.step.models import SIZES, config, random_model
from stepdpo_kernels.packing import pack_pairs
from stepdpo_kernels.types import StepPair

# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_drawn_lengths_are_like_the_real_ones() -> None:
    drawn = lengths.draw_lengths(3000)
    assert np.mean([of.prefix for of in drawn]) == pytest.approx(131, rel=0.06)
    assert np.mean([of.chosen for of in drawn]) == pytest.approx(25, rel=0.06)
    assert np.mean([of.rejected for of in drawn]) == pytest.approx(25, rel=0.06)
    assert len(drawn) / (drawn[-1].problem + 1) == pytest.approx(1534 / 563, rel=0.06)
    pairs = lengths.pairs_of(drawn, 1000)
    tokens = {share: sum(b.num_tokens for b in pack_pairs(pairs, 10**9, share=share)) for share in ("none", "tree")}
    assert tokens["none"] / tokens["tree"] == pytest.approx(3.6, rel=0.06)


def sizes(pair: StepPair) -> tuple[int, int, int]:
    return pair.prefix_ids.size, pair.chosen_ids.size, pair.rejected_ids.size


def test_pairs_have_the_lengths_and_share_what_they_say() -> None:
    drawn = lengths.draw_lengths(40, seed=3)
    for of, pair in zip(drawn, lengths.pairs_of(drawn, 1000, seed=3), strict=True):
        assert (pair.prefix_ids.size, pair.chosen_ids.size, pair.rejected_ids.size) == (
            of.prefix,
            of.chosen,
            of.rejected,
        )
        assert pair.group == str(of.problem)
        assert pair.chosen_ids[0] != pair.rejected_ids[0]
    made = lengths.pairs_of(lengths.branching(2, 50, 8, 3), 1000)
    assert [pair.group for pair in made] == ["0", "0", "0", "1", "1", "1"]
    # Three wrong steps and a right one after one prefix; a step's last token is no node.
    assert pack_pairs(made, 10**9)[0].num_tokens == 2 * (50 + 4 * 7)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_case(**changes: Any) -> dict[str, Any]:
    return {"mode": "full", "dtype": "float32", "heads": "tiny", "device": "cpu", **changes}


ATTENTION = [p.name for p in attention.PROVIDERS if "cpu" in p.devices and p.role != "floor"]


@pytest.mark.parametrize("mode", ["full", "forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "flex-shared-prefix"])
def test_every_attention_is_right(name: str, dtype: str, mode: str) -> None:
    case = attention_case(dtype=dtype, mode=mode)
    errors = attention_task.errors(name, case)
    assert list(errors) == ["error", "error_dq", "error_dk", "error_dv"][: 4 if mode == "full" else 1]
    assert all(error <= attention_task.tolerance(case) for error in errors.values()), errors


@pytest.mark.slow
def test_flex_attention_over_pairs_is_right() -> None:
    case = attention_case(mode="forward")
    assert attention_task.errors("flex-shared-prefix", case)["error"] < attention_task.tolerance(case)


def test_the_mask_of_pairs_is_that_of_their_plan() -> None:
    from stepdpo_kernels.ops.tree_attention.reference import dense_mask

    layout = Forest({**attention_case(), **attention_task.SMALL}).layout("pair")
    pair, second, first = attention_providers.pair_places(layout)
    place = torch.arange(len(pair))
    causal = place[:, None] >= place[None]
    mask = (pair[:, None] == pair[None]) & causal & ~(second[:, None] & first[None])
    assert torch.equal(mask, dense_mask(layout.plan))


@pytest.mark.parametrize("fault", ["leak", "scale", "upstream"])
def test_a_wrong_attention_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(forest: Forest) -> Any:
        work = attention_providers.WORKS["ours"](forest)
        if fault == "scale":
            inner = work.forward
            work.forward = lambda q, k, v: inner([1.1 * q[0]], k, v)
        elif fault == "leak":  # plain causal attention along the packed line: branches see one another
            layout = forest.layout("tree")
            work = attention_providers.in_a_line(
                forest,
                layout,
                lambda q, k, v: attention_providers.causal_sdpa(
                    *(x.transpose(0, 1)[None] for x in (q, k, v)), forest.scale
                )[0].transpose(0, 1),
            )
        else:
            work.upstream = [torch.ones_like(x) for x in work.upstream]
        return work

    monkeypatch.setitem(attention_providers.WORKS, "wrong", wrong)
    case = attention_case()
    assert max(attention_task.errors("wrong", case).values()) > 10 * attention_task.tolerance(case)


@pytest.mark.parametrize(("mode", "tensors"), [("forward", (2, 2)), ("full", (4, 4))])
def test_the_floor_of_bytes_moves_each_tensor_once(mode: str, tensors: tuple[int, int]) -> None:
    case = {**attention_case(mode=mode), **attention_task.SMALL}
    forest = Forest(case)
    copies = attention_task.load("bytes", case, Path()).run()[0]
    of_heads, of_kv_heads = tensors
    assert 2 * sum(x.numel() for x in copies) == of_heads * forest.query.numel() + of_kv_heads * forest.key.numel()


def test_visible_pairs_are_counted() -> None:
    from stepdpo_kernels.ops.tree_attention.reference import dense_mask

    forest = Forest({**attention_case(), **attention_task.SMALL})
    assert forest.visible == int(dense_mask(forest.plan).sum())
    heads, _, size = attention.HEADS["tiny"]
    assert attention_providers.operations(forest, attention_case()) == 12 * heads * size * forest.visible


# ---- models and trainers ---------------------------------------------------------------------------------------------


def model_case(**changes: Any) -> dict[str, Any]:
    return {**step.case("cpu", "tiny", dtype="float32"), **models.SMALL, **changes}


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", [p.name for p in step.MODEL_PROVIDERS if p.role != "floor"])
def test_every_way_through_a_model_is_right(name: str, mode: str) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    errors = models.errors(name, model_case(mode=mode))
    assert errors["error"] < 1e-5
    assert errors["error_gradient"] < 1e-5


def test_a_model_that_forgets_a_pair_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(models.Packed):
        def losses(self) -> list[torch.Tensor]:
            self.batches = self.batches[:1]
            return super().losses()

    monkeypatch.setitem(models.PROVIDERS, "wrong", lambda case: Forgetful(case, "none"))
    errors = models.errors("wrong", model_case())
    assert max(errors.values()) > models.TOLERANCE["float32"]


def test_the_floor_does_the_products_of_the_model() -> None:
    """Counted by torch: as many operations as the model's own linear layers need for the unique tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    task = models.load("products", model_case(), Path())
    with FlopCounterMode(display=False) as counted:
        task.run()
    hidden, intermediate, layers, heads, kv_heads, vocabulary, _ = SIZES["tiny"]
    size = hidden // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv_heads * size + 3 * hidden * intermediate)
    batches = pack_pairs(models.pairs(model_case()), model_case()["max_tokens"])
    tokens, rows = sum(b.num_tokens for b in batches), sum(b.num_rows for b in batches)
    assert counted.get_total_flops() == 3 * 2 * (tokens * weights + rows * hidden * vocabulary)


@pytest.mark.parametrize("name", list(SIZES))
def test_models_have_the_sizes_that_they_are_named_for(name: str) -> None:
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config(name)).parameters())
    expected = {
        "tiny": 1.136e6,
        "llama-21M": 20.6e6,
        "SmolLM2-135M": 134.5e6,
        "Qwen2-0.5B": 494e6,
        "Qwen2-1.5B": 1543.7e6,
        "Qwen2-7B": 7615.6e6,
    }
    assert count == pytest.approx(expected[name], rel=0.03)


def test_random_models_are_the_same_each_time() -> None:
    a, b = (next(random_model("tiny", "float32", "cpu").parameters()) for _ in range(2))
    assert torch.equal(a, b)


def test_made_up_pairs_have_the_lengths_that_were_drawn(tmp_path: Path) -> None:
    from benchmarks.suites.step.models import write_model, write_pairs
    from stepdpo_kernels import load_step_pairs
    from stepdpo_kernels.trainer import load_tokenizer

    write_model(tmp_path / "model", "tiny", "float32")
    write_pairs(tmp_path / "pairs.jsonl", 30)
    found = load_step_pairs(tmp_path / "pairs.jsonl", load_tokenizer(str(tmp_path / "model")), max_length=None)
    for of, pair in zip(lengths.draw_lengths(30), found, strict=True):
        assert (pair.prefix_ids.size, pair.chosen_ids.size, pair.rejected_ids.size) == (
            of.prefix,
            of.chosen,
            of.rejected,
        )


def test_a_trainer_that_logs_something_else_is_caught() -> None:
    true = dict.fromkeys(trainers.LOGGED, 3.0)
    assert trainers.judged({**true, "status": "ok"}, true)["status"] == "ok"
    for name in trainers.LOGGED:
        for value in (3.01, -3.0, float("nan")):
            assert trainers.judged({**true, name: value}, true)["status"] == "wrong"


def context(**changes: Any) -> Context:
    return Context(device="cpu", rounds=1, keep=lambda _: None, threads=1, **changes)


def test_an_update_that_is_not_the_right_one_is_caught() -> None:
    told = context(only=("ours",))
    with trainers.inputs_of({"model": "tiny", "dtype": "float32"}, "", "", trainers.PAIRS) as (model, data):
        settings = trainers.settings_of("ours", {**trainers.VERIFIED, "mode": "full"}, told, model, data)
        of = settings | trainers.CHECKED
        true = trainers.two_steps({**of, "trainer": "oracle"}, told)
        assert true["second_loss"] < 0.9 * true["loss"]  # so that its sign and its size count
        assert trainers.judged(trainers.two_steps(of, told), true)["status"] == "ok"
        faster = trainers.judged(trainers.two_steps({**of, "learning_rate": 1.1e-4}, told), true)
        assert [name for name, error in faster["errors"].items() if error > trainers.TOLERANCE] == ["error_second_loss"]


def test_steps_are_whole_numbers_of_forward_passes() -> None:
    for workload in step.WORKLOADS:
        for device, size in product(("cpu", "cuda"), registry.SIZES):
            for of in workload.cases(device, size) if workload.kernel == "training_step" else ():
                for name in trainers.SETTINGS:
                    told = trainers.settings_of(name, of, context(), "", "")
                    if told["trainer"] == "trl":
                        assert told["pairs_per_step"] % told["at_once"] == 0, (name, of)
                        assert told["pairs_per_step"] >= told["at_once"]


def test_every_trainer_has_its_settings() -> None:
    assert {p.name for p in step.TRAINING_PROVIDERS} == set(trainers.SETTINGS)
    known = {"trainer", "at_once", *trainers.DEFAULTS}
    assert all(set(settings) <= known for settings in trainers.SETTINGS.values())


def test_twentieths_rise() -> None:
    for table in (lengths.SHORTEST_PREFIX, lengths.BEYOND_IT, lengths.CHOSEN, lengths.REJECTED):
        assert len(table) == 21
        assert all(a <= b for a, b in pairwise(table))
