"""The cache of reference log-probs: hit only by what they depend on, whole or absent, and never trusted blindly."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepdpo_kernels.data import StepPairDataset
from stepdpo_kernels.packing.reference import padded_batch
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer import reference as reference_module
from stepdpo_kernels.types import PackedBatch, StepDPOError
from tests.trainer.training import entries, losses, make_pairs, watch


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Grows by the number of pairs at every pass of a reference."""
    counted: list[int] = []
    compute = reference_module.compute_ref_logps

    def count(model: Any, num_pairs: int, *args: Any, **options: Any) -> Any:
        counted.append(num_pairs)
        return compute(model, num_pairs, *args, **options)

    monkeypatch.setattr("stepdpo_kernels.trainer.ref_logps.compute_ref_logps", count)
    return counted


@pytest.fixture
def reference_of(config) -> Callable[..., torch.Tensor]:
    """reference_of(model, pairs, ref_model=None, **fields): (N, 2), as a trainer has it after one evaluation."""

    def get(model, pairs, ref_model=None, eval_pairs=None, **fields):
        trainer = StepDPOTrainer(model, config(**fields), pairs, ref_model=ref_model, eval_dataset=eval_pairs or pairs)
        trainer.evaluate()
        return trainer.train_dataset.ref_logps

    return get


@torch.no_grad()
def plain_logps(model, pairs) -> torch.Tensor:  # (N, 2)
    batch = padded_batch(pairs)
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return logps.sum(dim=1).view(2, -1).T


def test_the_table_is_what_the_plain_model_gives(tiny_model, pairs, reference_of):
    table = reference_of(tiny_model(), pairs)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, plain_logps(tiny_model(), pairs), rtol=1e-5, atol=0)


def test_a_second_run_reads_and_does_not_compute(tiny_model, pairs, reference_of, passes, tmp_path):
    first = reference_of(tiny_model(), pairs)
    assert passes == [24, 24]  # for training and for evaluation, which draw the pairs into other forests
    assert len(entries(tmp_path / "cache")) == 2
    assert torch.equal(reference_of(tiny_model(), pairs), first)
    assert passes == [24, 24]


def test_one_trainer_computes_once(tiny_model, pairs, config, passes):
    trainer = StepDPOTrainer(tiny_model(), config(), pairs, eval_dataset=pairs[:6])
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert passes == [24, 6]


def test_training_is_the_same_with_and_without_a_cache(tiny_model, pairs, config, passes, tmp_path):
    """The pass over the reference must not move the random numbers that draw the pairs."""
    runs = []
    for name in ("computed", "cached"):
        trainer = StepDPOTrainer(tiny_model(), config(output_dir=str(tmp_path / name)), pairs)
        seen = watch(trainer)
        trainer.train()
        runs.append(([batch.pair_index.tolist() for batch, _, _ in seen], losses(trainer)))
    assert runs[0] == runs[1]
    assert passes == [24]


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "data seed": {"data_seed": 7},
    "budget": {"max_tokens_per_batch": 500},
    "sharing": {"share": "pair"},
    "pairs a step": {"pairs_per_step": 6},
    "precision": {"bf16": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_forests_or_precision_makes_another_key(tiny_model, pairs, config, passes, change, tmp_path):
    for number, fields in enumerate(({}, CHANGES[change], CHANGES[change])):
        trainer = StepDPOTrainer(
            tiny_model(), config(output_dir=str(tmp_path / f"run{number}"), learning_rate=0.0, **fields), pairs
        )
        seen = watch(trainer)
        trainer.train()
        assert not any(output.margins.any() for _, output, _ in seen)
    assert passes == [24, 24]
    assert len(entries(tmp_path / "cache")) == 2


def test_compiled_layers_make_another_key(tiny_model, pairs, config):
    """Their bits are others, but a run may go on with them."""
    keys = []
    for fields in ({}, {"torch_compile": True}):
        trainer = StepDPOTrainer(tiny_model(), config(**fields), pairs)
        keys.append(trainer.reference_key("train", trainer.train_dataset))
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["kernels"]
    assert reference_module.key_differences(*keys) == []


def test_the_evaluation_batch_makes_another_key(tiny_model, pairs, config, passes, tmp_path):
    for size in (4, 6, 4):
        trainer = StepDPOTrainer(tiny_model(), config(per_device_eval_batch_size=size), pairs, eval_dataset=pairs[:12])
        seen = watch(trainer)
        trainer.evaluate()
        assert not any(output.margins.any() for _, output, _ in seen)
    assert passes == [24, 12, 12]


def test_what_leaves_forests_alone_makes_no_other_key(tiny_model, pairs, reference_of, passes):
    reference_of(tiny_model(), pairs)
    for fields in ({"beta": 0.1}, {"learning_rate": 1e-5}, {"num_train_epochs": 3}, {"label_smoothing": 0.1}):
        reference_of(tiny_model(), pairs, **fields)
    assert len(passes) == 2


def other_weights(make):
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-6
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda make: make(seed=1),
        other_weights,
        lambda make: make().to(torch.bfloat16),
        lambda make: make("qwen2"),
    ],
    ids=["seed", "one weight", "dtype", "architecture"],
)
def test_other_weights_make_another_key(tiny_model, pairs, reference_of, passes, other):
    first = reference_of(tiny_model(), pairs)
    second = reference_of(other(tiny_model), pairs)
    assert len(passes) == 4
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, chosen_ids=[*p.chosen_ids[:-1], 9]),
        lambda p: replace(p, prefix_ids=[*p.prefix_ids, 9]),
        lambda p: replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids),
        # One token moved over a boundary: the same tokens laid end to end.
        lambda p: replace(p, prefix_ids=p.prefix_ids[:-1], chosen_ids=[p.prefix_ids[-1], *p.chosen_ids]),
        lambda p: replace(p, group="alone"),
    ],
    ids=["token", "longer", "swapped", "boundary", "group"],
)
def test_other_pairs_make_another_key(tiny_model, pairs, config, passes, change, tmp_path):
    changed = StepPairDataset([*pairs[:5], change(pairs[5]), *pairs[6:]])
    for name, data in (("one", pairs), ("other", changed), ("again", pairs)):
        fields = {"output_dir": str(tmp_path / name), "learning_rate": 0.0, "max_tokens_per_batch": 8192}
        trainer = StepDPOTrainer(tiny_model(), config(**fields), data)
        seen = watch(trainer)
        trainer.train()
        assert not any(output.margins.any() for _, output, _ in seen)
    assert passes == [24, 24]


def test_the_order_of_the_pairs_counts(tiny_model, pairs, reference_of, passes):
    turned = StepPairDataset(list(pairs)[::-1])
    a, b = reference_of(tiny_model(), pairs), reference_of(tiny_model(), turned)
    torch.testing.assert_close(a, b.flip(0), rtol=1e-5, atol=0)
    assert len(passes) == 4


def test_two_datasets_share_a_folder(tiny_model, pairs, step_records, tiny_tokenizer, reference_of, tmp_path):
    others = make_pairs(step_records(6, 4, seed=5), tiny_tokenizer(), tmp_path)
    one, two = reference_of(tiny_model(), pairs), reference_of(tiny_model(), others)
    assert not torch.equal(one, two)
    assert torch.equal(reference_of(tiny_model(), pairs), one)
    assert torch.equal(reference_of(tiny_model(), others), two)
    assert len(entries(tmp_path / "cache")) == 4


def damage_truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-16])


def damage_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def damage_value(file: Path) -> None:
    """A float's exponent: still a safetensors file, with another number in it."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x01
    file.write_bytes(data)


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_key(file: Path) -> None:
    """The table of another key under this name."""
    save_file({"ref_logps": torch.zeros(24, 2)}, file, metadata={"model": "another"})


def damage_name(file: Path) -> None:
    with safe_open(file, framework="pt") as whole:
        metadata = whole.metadata()
    save_file({"logps": torch.zeros(24, 2)}, file, metadata=metadata)


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_header, damage_value, damage_empty, damage_key, damage_name]
)
def test_a_damaged_file_is_computed_again_and_replaced(tiny_model, pairs, config, passes, damage, tmp_path):
    tables, files = [], []
    for _ in range(3):
        trainer = StepDPOTrainer(tiny_model(), config(), pairs)
        trainer.prepare_references()
        tables.append(trainer.train_dataset.ref_logps)
        (file,) = (tmp_path / "cache").iterdir()
        with safe_open(file, framework="pt") as opened:
            files.append((opened.metadata(), opened.get_tensor("ref_logps").tolist()))
        if len(tables) == 1:
            damage(file)
    assert passes == [24, 24]
    assert files[0] == files[1] == files[2]
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_nothing_half_written_is_left_by_a_failure_in_saving(tiny_model, pairs, config, monkeypatch, failure, tmp_path):
    def half(tensors: Any, file: str, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "save_file", half)
        with pytest.raises(failure):
            StepDPOTrainer(tiny_model(), config(), pairs).train()
    assert entries(tmp_path / "cache") == []
    assert entries(tmp_path / "run") == []
    StepDPOTrainer(tiny_model(), config(), pairs).train()


def test_nothing_is_left_by_a_failure_in_computing(tiny_model, pairs, config, monkeypatch, tmp_path):
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    trainer = StepDPOTrainer(tiny_model(), config(), pairs)
    monkeypatch.setattr(trainer.loss, "packed_logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert entries(tmp_path / "cache") == []
    assert entries(tmp_path / "run") == []


@pytest.mark.parametrize("damage", [None, "bytes", "key"])
def test_a_pass_that_was_stopped_goes_on(tiny_model, pairs, config, monkeypatch, tmp_path, damage):
    """It makes the passes that are left, and the table is the same, bit for bit; what is damaged is not used."""
    monkeypatch.setattr(reference_module, "SAVE_SECONDS", 0.0)
    made: list[int] = []
    logps = StepDPOTrainer._logps

    def stop_after(passes: int | None) -> None:
        def counted(self: StepDPOTrainer, model: Any, batch: PackedBatch) -> torch.Tensor:
            if passes is not None and len(made) == passes:
                raise KeyboardInterrupt
            made.append(batch.num_pairs)
            return logps(self, model, batch)

        monkeypatch.setattr(StepDPOTrainer, "_logps", counted)

    undisturbed = StepDPOTrainer(tiny_model(), config(reference_cache_dir=str(tmp_path / "other")), pairs)
    stop_after(None)
    undisturbed.prepare_references()
    total = len(made)
    assert total > 6
    made.clear()
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        StepDPOTrainer(tiny_model(), config(), pairs).prepare_references()
    (part,) = (tmp_path / "cache").iterdir()
    assert part.name.endswith(".0of1.part")
    if damage == "bytes":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "key":
        with safe_open(part, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("table", "seen", "passes")}
            save_file(tensors, part, metadata=file.metadata() | {"model": "another"})
    made.clear()
    stop_after(None)
    resumed = StepDPOTrainer(tiny_model(), config(), pairs)
    resumed.prepare_references()
    assert len(made) == (total - 5 if damage is None else total)
    assert torch.equal(resumed.train_dataset.ref_logps, undisturbed.train_dataset.ref_logps)
    (table,) = (tmp_path / "cache").iterdir()
    assert table.suffix == ".safetensors"


def test_a_cache_that_cannot_be_written_costs_no_run(tiny_model, pairs, config, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    trainer = StepDPOTrainer(tiny_model(), config(learning_rate=0.0), pairs)
    with caplog.at_level(logging.WARNING, "stepdpo_kernels"):
        trainer.train()
    assert "could not be cached" in caplog.text
    assert losses(trainer) == pytest.approx([math.log(2)] * 6, abs=1e-7)


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reference_module.default_cache_dir() == tmp_path / "stepdpo_kernels" / "reference"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reference_module.default_cache_dir() == tmp_path / ".cache" / "stepdpo_kernels" / "reference"


def test_a_reference_model_of_its_own_is_what_is_used(tiny_model, pairs, reference_of, passes):
    table = reference_of(tiny_model(), pairs, ref_model=tiny_model(seed=3))
    torch.testing.assert_close(table, plain_logps(tiny_model(seed=3), pairs), rtol=1e-5, atol=0)
    assert torch.equal(reference_of(tiny_model(seed=8), pairs, ref_model=tiny_model(seed=3)), table)
    assert len(passes) == 2  # the policy is not part of the key


def test_the_reference_of_lora_is_the_model_without_it(tiny_model, pairs, reference_of, passes):
    """Also with an adapter that is trained already, and other than the model, which the run continues from."""
    from peft import LoraConfig, get_peft_model

    plain = plain_logps(tiny_model(), pairs)
    for seed in (0, 1):
        torch.manual_seed(seed)
        adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        assert not torch.allclose(plain_logps(adapted, pairs), plain, rtol=1e-3)
        torch.testing.assert_close(reference_of(adapted, pairs), plain, rtol=1e-5, atol=0)
    assert len(passes) == 2  # adapters are not part of the key


def test_the_adapter_of_a_reference_model_is_part_of_it(tiny_model, pairs, reference_of, passes):
    from peft import LoraConfig, get_peft_model

    for seed in (0, 1):
        torch.manual_seed(seed)
        adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        expected = plain_logps(adapted, pairs)
        table = reference_of(tiny_model(), pairs, ref_model=adapted)
        torch.testing.assert_close(table, expected, rtol=1e-5, atol=0)
    assert len(passes) == 4


def test_without_a_reference_none_is_computed(tiny_model, pairs, config, passes, tmp_path):
    model = tiny_model()
    plain = copy.deepcopy(model)
    trainer = StepDPOTrainer(model, config(reference="none"), pairs)
    seen = watch(trainer)
    trainer.train()
    assert passes == []
    assert entries(tmp_path / "cache") == []
    batch, output, _ = seen[0]
    logps = plain_logps(plain, [pairs[i] for i in batch.pair_index.tolist()])
    torch.testing.assert_close(output.chosen_rewards, 0.4 * logps[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.margins, 0.4 * (logps[:, 0] - logps[:, 1]), rtol=0, atol=1e-4)


def test_new_evaluation_pairs_need_a_reference_that_is_still_there(tiny_model, pairs, config, tmp_path):
    trainer = StepDPOTrainer(tiny_model(), config(), pairs[:8])
    assert trainer.evaluate(pairs[8:12])["eval_rewards/margins"] == 0.0
    trainer.train()
    with pytest.raises(StepDPOError, match="eval_dataset: give it to StepDPOTrainer at the start"):
        trainer.evaluate(pairs[12:16])
    with_reference = StepDPOTrainer(
        trainer.model, config(output_dir=str(tmp_path / "second")), pairs[:8], ref_model=tiny_model()
    )
    with_reference.train()
    metrics = with_reference.evaluate(pairs[12:16])
    plain = plain_logps(tiny_model(), pairs[12:16])
    now = plain_logps(with_reference.model, pairs[12:16])
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.4 * float((now - plain)[:, 0].mean()), abs=1e-4)
