"""TRL's DPOTrainer with and without `accelerate_dpo`: the same losses, metrics and weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from trl.trainer import dpo_trainer

from stepdpo_kernels.integrations import trl as integration
from stepdpo_kernels.integrations.forest_forward import Accelerated
from stepdpo_kernels.integrations.trl import KEY, StepDPOTRLTrainer, accelerate_dpo
from stepdpo_kernels.model import padded_logps
from stepdpo_kernels.types import StepDPOError
from tests.families import FAMILIES, tiny_model
from tests.integrations.trl_runs import VERSION, history, make_trainer, plain_rows, since

# The same trajectory, of losses and of everything that is logged.
TOLERANCE = 1e-5


@pytest.fixture
def rows(step_records) -> Dataset:
    return plain_rows(step_records(4, 6))


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer("qwen2")


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, int]]:
    """(tokens encoded, tokens of the same sequences) of every forward pass over a forest."""
    seen = []

    def watched(model: Any, forest: Any, **options: Any) -> Any:
        seen.append((forest.batch.num_tokens, forest.batch.tokens_unshared))
        return padded_logps(model, forest, **options)

    monkeypatch.setattr(integration, "padded_logps", watched)
    return seen


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            scale = max(abs(value), 1.0)
            if "rewards" in name:  # differences of log-probs are as exact as those
                scale = 10.0
            if name == "grad_norm":
                scale *= 5
            if "rewards/accuracies" in name and abs(other[name.replace("accuracies", "margins")]) < 1e-3:
                continue  # the sign of nothing: the policy is the reference
            assert abs(mine[name] - value) <= tolerance * scale, f"step {step}, {name}: {mine[name]} is not {value}"


def compare(
    folder, rows, tokenizer, packed, tolerance: float = TOLERANCE, build: Any = make_trainer, **settings
) -> None:
    theirs = build(folder, rows, tokenizer, **settings)
    theirs.train()
    assert not packed
    ours = build(folder, rows, tokenizer, **settings)
    accelerate_dpo(ours)
    ours.train()
    assert packed
    assert_same(history(ours), history(theirs))
    for (name, mine), (_, other) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert (mine - other).norm() <= 1e-3 * other.norm(), name  # Adam makes much of a gradient that is all but 0


LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "sigmoid_norm": {},  # per token, as SimPO is, with a reference
    "sft": {},
    "aot": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {"beta": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
}


@pytest.mark.parametrize("loss", [*LOSSES][:5])
def test_trajectories_are_the_same(loss, tmp_path, rows, tokenizer, packed):
    compare(tmp_path, rows, tokenizer, packed, loss_type=[loss], precompute_ref_log_probs=True, **LOSSES[loss])
    assert sum(encoded for encoded, _ in packed) < 0.6 * sum(unshared for _, unshared in packed)


@pytest.mark.parametrize("loss", [*LOSSES][5:])
def test_every_other_loss_is_the_same(loss, tmp_path, rows, tokenizer, packed):
    settings = {"precompute_ref_log_probs": True, "max_steps": 4, "per_device_train_batch_size": 6}
    compare(tmp_path, rows, tokenizer, packed, loss_type=[loss], **settings | LOSSES[loss])


@pytest.mark.parametrize(
    "settings",
    [
        {"use_weighting": True},  # WPO
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"max_length": 60, "truncation_mode": "keep_start"},
        {"truncation_mode": "keep_end", "max_length": 40},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "precompute_ref_log_probs": False},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},  # the last micro-batch has 4 pairs
        {"pad_to_multiple_of": 16},
        {"dataloader_num_workers": 1, "max_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_keep_their_meaning(settings, tmp_path, rows, tokenizer, packed):
    compare(tmp_path, rows, tokenizer, packed, **{"max_steps": 4, "precompute_ref_log_probs": True} | settings)


LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True, task_type="CAUSAL_LM")


@pytest.mark.parametrize("reference", ["given", "loaded", "adapter", "adapter and checkpointing", "trained adapter"])
def test_every_reference_is_the_same(reference, tmp_path, rows, tokenizer, packed):
    """The policy is 0.02 away from the reference at first, so that the first losses say something."""

    def moved(model):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        return model

    def build(folder, dataset, tokenizer, **settings):
        if reference == "given":
            return make_trainer(
                folder, dataset, tokenizer, model=moved(tiny_model()), arguments={"ref_model": tiny_model()}, **settings
            )
        if reference == "loaded":
            tiny_model().save_pretrained(folder / "model")
            return make_trainer(folder, dataset, tokenizer, model=str(folder / "model"), **settings)
        if reference == "trained adapter":
            from peft import get_peft_model

            torch.manual_seed(1)
            adapted = get_peft_model(
                tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            )
            return make_trainer(folder, dataset, tokenizer, model=adapted, **settings)
        torch.manual_seed(1)  # an older TRL draws the adapter before it sets its seed
        checkpointing = {"gradient_checkpointing": "checkpointing" in reference}
        return make_trainer(
            folder, dataset, tokenizer, arguments={"peft_config": LORA}, **checkpointing | settings, learning_rate=3e-3
        )

    compare(tmp_path, rows, tokenizer, packed, build=build, max_steps=10)


def test_experts_are_balanced_as_before(tmp_path, rows, tokenizer, packed):
    config = {"router_aux_loss_coef": 0.5, "max_steps": 4, "precompute_ref_log_probs": True}
    if not since("1.10"):
        pytest.skip("this TRL takes the coefficient from nowhere else")
    compare(tmp_path, rows, tokenizer, packed, family="qwen3_moe", **config)


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "granite"])
def test_families_that_need_care_are_the_same(family, tmp_path, rows, tokenizer, packed):
    compare(tmp_path, rows, tokenizer, packed, family=family, max_steps=4, precompute_ref_log_probs=True)


def test_evaluation_is_the_same(tmp_path, rows, tokenizer, packed):
    logs = []
    for accelerated in (False, True):
        trainer = make_trainer(
            tmp_path, rows, tokenizer, arguments={"eval_dataset": rows.select(range(7))}, max_steps=2
        )
        if accelerated:
            accelerate_dpo(trainer)
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
        logs.append(history(trainer))
    assert packed
    assert_same(*logs)
    assert {"eval_entropy", "eval_mean_token_accuracy", "eval_logits/chosen"} <= logs[0][-1].keys()


def test_pairs_without_a_common_prefix_are_the_same(tmp_path, step_records, tokenizer, packed):
    rows = Dataset.from_list(
        [
            {"prompt": f"{number}", "chosen": f"{number * 17} is it", "rejected": f"no{number} not"}
            for number in range(101, 113)
        ]
    )
    compare(tmp_path, rows, tokenizer, packed, max_steps=4, precompute_ref_log_probs=True)


@pytest.mark.parametrize("where", ["model", "autocast"])
def test_bfloat16_is_as_near_to_float32_as_trls(where, tmp_path, rows, tokenizer, packed):
    settings = {"max_steps": 8, "learning_rate": 1e-5}
    low = {"dtype": torch.bfloat16} if where == "model" else {"bf16": True}
    runs = [make_trainer(tmp_path, rows, tokenizer, **settings | more) for more in ({}, low, low)]
    accelerate_dpo(runs[2])
    for run in runs:
        run.train()
    assert packed
    exact, theirs, ours = (
        torch.tensor([[entry[f"logps/{side}"] for side in ("chosen", "rejected")] for entry in history(run)])
        for run in runs
    )
    assert (ours - exact).square().mean() <= (theirs - exact).square().mean() * 1.1


def test_removing_it_restores_trl(tmp_path, rows, tokenizer, packed):
    theirs = make_trainer(tmp_path, rows, tokenizer, max_steps=3)
    theirs.train()
    trainer = make_trainer(tmp_path, rows, tokenizer, max_steps=3)
    models = [trainer.model, trainer.ref_model] if trainer.ref_model is not None else [trainer.model]
    before = [(m.forward, vars(m).get("forward"), m.config._attn_implementation) for m in models]
    collator, functions = trainer.data_collator, dict(vars(dpo_trainer))
    with accelerate_dpo(trainer) as handle:
        assert isinstance(handle, Accelerated)
        assert accelerate_dpo(trainer) is handle
        assert trainer.data_collator is not collator
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            trainer.compute_loss(trainer.model, batch)
        assert len(packed) >= 1
    assert [(m.forward, vars(m).get("forward"), m.config._attn_implementation) for m in models] == before
    assert trainer.data_collator is collator
    assert dict(vars(dpo_trainer)) == functions
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    count = len(packed)
    trainer.train()
    handle.remove()
    assert len(packed) == count
    assert history(trainer) == history(theirs)
    assert all(a.equal(b) for a, b in zip(trainer.model.parameters(), theirs.model.parameters(), strict=True))


def test_removing_it_after_training_leaves_trl(tmp_path, rows, tokenizer, packed):
    trainer = make_trainer(tmp_path, rows, tokenizer, max_steps=1, bf16=True)
    handle = accelerate_dpo(trainer)
    trainer.train()
    handle.remove()
    count = len(packed)
    trainer.train()
    assert len(packed) == count


def test_a_model_generates_and_is_saved_as_before(tmp_path, rows, tokenizer, packed):
    trainer = make_trainer(tmp_path, rows, tokenizer, max_steps=1)
    prompt = tokenizer("Ann has 12 apples", return_tensors="pt").input_ids
    expected = trainer.model.generate(prompt, max_new_tokens=5, do_sample=False)
    accelerate_dpo(trainer)
    assert trainer.model.generate(prompt, max_new_tokens=5, do_sample=False).equal(expected)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert loaded.config._attn_implementation == "sdpa"
    assert all(a.equal(b) for a, b in zip(trainer.model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.skipif(not since("1.15"), reason="an older TRL takes them from the logits of the loss")
def test_compute_metrics_gets_its_logits(tmp_path, rows, tokenizer, packed):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"n": float(len(prediction.predictions))}

    arguments = {"eval_dataset": rows.select(range(4)), "compute_metrics": compute_metrics}
    trainer = make_trainer(tmp_path, rows, tokenizer, arguments=arguments)
    accelerate_dpo(trainer)
    assert trainer.evaluate()["eval_n"] == 4  # TRL hands over no more
    assert shapes[0][-1] == trainer.model.config.vocab_size
    assert packed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_free": True}, "padding_free is set.*leave it out"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha scales its noise"),
        ({"torch_compile": True}, "torch_compile would compile"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches cuts batches"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(settings, message, tmp_path, rows, tokenizer):
    trainer = make_trainer(tmp_path, rows, tokenizer, **settings)
    collator, forward = trainer.data_collator, trainer.model.forward
    with pytest.raises(StepDPOError, match=message):
        accelerate_dpo(trainer)
    assert trainer.data_collator is collator
    assert trainer.model.forward == forward


def test_models_that_cannot_be_packed_are_refused(tmp_path, rows, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    recurrent = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, pad_token_id=2))
    reference = {"ref_model": MambaForCausalLM(recurrent.config)}
    trainer = make_trainer(tmp_path, rows, tokenizer, model=recurrent, arguments=reference)
    with pytest.raises(StepDPOError, match=r"Mamba.*cannot be packed"):
        accelerate_dpo(trainer)
    adapted = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):  # TRL itself, or we
        accelerate_dpo(make_trainer(tmp_path, rows, tokenizer, arguments={"peft_config": adapted}))
    with pytest.raises(StepDPOError, match=r"expected a trl\.DPOTrainer, got str"):
        accelerate_dpo("trainer")


def test_other_versions_are_refused(monkeypatch):
    from stepdpo_kernels.integrations import versions

    monkeypatch.setattr(versions, "version", lambda _: "1.17.0")
    with pytest.raises(StepDPOError, match=r"trl 1\.17\.0 is not supported.*pip install 'trl>=1\.9,<1\.17'"):
        versions.require("trl", "1.9", "1.17")
    assert str(VERSION) != "1.17.0"


def test_a_batch_without_a_forest_goes_the_old_way(tmp_path, rows, tokenizer, packed):
    trainer = make_trainer(tmp_path, rows, tokenizer)
    accelerate_dpo(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        packed_loss = trainer.compute_loss(trainer.model, dict(batch))
        count = len(packed)
        del batch[KEY]
        plain_loss = trainer.compute_loss(trainer.model, batch)
    assert len(packed) == count > 0
    torch.testing.assert_close(packed_loss, plain_loss, rtol=1e-5, atol=1e-6)


def test_a_batch_with_more_than_text_is_refused(tmp_path, rows, tokenizer):
    trainer = make_trainer(tmp_path, rows, tokenizer)
    plain = trainer.data_collator
    trainer.data_collator = lambda examples: plain(examples) | {"token_type_ids": torch.zeros(8)}
    accelerate_dpo(trainer)
    with pytest.raises(StepDPOError, match="gave token_type_ids, which packing would leave out"):
        trainer.train()


class TestStepPairs:
    """StepDPOTRLTrainer on records of the released schema."""

    @pytest.fixture
    def records(self, step_records) -> Dataset:
        return Dataset.from_list(step_records(4, 6))

    def make(self, folder, records, tokenizer, **settings):
        settings = {"precompute_ref_log_probs": True, **settings}
        return make_trainer(folder, records, tokenizer, trainer_class=StepDPOTRLTrainer, **settings)

    def test_no_end_of_turn_follows_a_step(self, tmp_path, records, tokenizer):
        trainer = self.make(tmp_path, records, tokenizer)
        assert len(trainer.train_dataset) == len(records)
        for row, record in zip(trainer.train_dataset, records, strict=True):
            whole = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
            assert whole.endswith(record["initial_reason_steps"] + record["chosen"])
            for name in ("chosen_ids", "rejected_ids"):
                assert tokenizer.eos_token_id not in row[name]

    @pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="our trainer needs a newer one")
    def test_the_first_margin_is_nothing_and_training_is_ours(self, tmp_path, records, tokenizer, packed):
        from stepdpo_kernels import StepDPOConfig, StepDPOTrainer
        from stepdpo_kernels.data import load_step_pairs
        from tests.trainer.training import losses, write_jsonl

        trainer = self.make(
            tmp_path, records, tokenizer, train_sampling_strategy="sequential", dtype=torch.bfloat16, max_steps=1
        )
        assert packed  # the references
        trainer.train()
        first = history(trainer)[0]
        assert first["rewards/margins"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)

        settings = {"learning_rate": 3e-4, "beta": 0.4, "max_grad_norm": 1.0, "train_sampling_strategy": "sequential"}
        shared = {"max_steps": 12, "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "seed": 0}
        trl_trainer = self.make(tmp_path, records, tokenizer, **settings | shared)
        trl_trainer.train()
        pairs = load_step_pairs(write_jsonl(tmp_path / "pairs.jsonl", list(records)), tokenizer)
        ours = StepDPOTrainer(
            tiny_model(**FAMILIES["llama"].config),
            StepDPOConfig(
                output_dir=str(tmp_path / "ours"),
                pairs_per_step=4,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                reference_cache_dir=str(tmp_path / "cache"),
                **settings | shared,
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        ours.train()
        assert losses(ours) == pytest.approx([entry["loss"] for entry in history(trl_trainer)], rel=1e-5)

    def test_what_does_not_fit_is_left_out_with_a_warning(self, tmp_path, records, tokenizer, caplog):
        rows = list(records)
        rows[3]["rejected"] = rows[3]["chosen"]
        rows[5]["prompt"] += " really" * 200
        trainer = self.make(tmp_path, Dataset.from_list(rows), tokenizer, max_length=150)
        assert len(trainer.train_dataset) == len(rows) - 2
        assert "row 3 of the train dataset (id '3') is left out: fields 'chosen' and 'rejected'" in caplog.text
        assert "row 5 of the train dataset (id '5') is left out: too long" in caplog.text

    def test_every_run_warns_of_what_it_leaves_out(self, tmp_path, records, tokenizer, caplog):
        rows = list(records)
        rows[3]["rejected"] = rows[3]["chosen"]
        Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
        prepared = []
        for _ in range(2):
            caplog.clear()
            data = Dataset.from_json(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
            prepared.append(self.make(tmp_path, data, tokenizer, precompute_ref_log_probs=False).train_dataset)
            assert "(id '3') is left out" in caplog.text
        assert prepared[0]._fingerprint == prepared[1]._fingerprint  # of which the cache of references makes use

    def test_it_is_prepared_by_as_many_processes_as_asked_for(self, tmp_path, records, tokenizer, monkeypatch):
        processes, plain = [], Dataset.map

        def watched(*args, num_proc=None, **kwargs):
            processes.append(num_proc)
            return plain(*args, **kwargs)

        monkeypatch.setattr(Dataset, "map", watched)
        self.make(tmp_path, records, tokenizer, dataset_num_proc=3, precompute_ref_log_probs=False)
        assert 3 in processes

    def test_weights_of_pairs_are_refused(self, tmp_path, records, tokenizer):
        weighted = [{**row, "weight": 0.5 if number == 2 else 1.0} for number, row in enumerate(records)]
        with pytest.raises(StepDPOError, match=r"row 2 of the train dataset .*'weight' is 0\.5, and TRL weighs"):
            self.make(tmp_path, Dataset.from_list(weighted), tokenizer)

    def test_references_that_trl_cached_are_others(self, tmp_path, rows, tokenizer, packed):
        rows.to_json(tmp_path / "rows.jsonl")
        counts = []
        for trainer_class in (dpo_trainer.DPOTrainer, StepDPOTRLTrainer, StepDPOTRLTrainer):
            data = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
            make_trainer(tmp_path, data, tokenizer, trainer_class=trainer_class, precompute_ref_log_probs=True)
            counts.append(len(packed))
        assert 0 == counts[0] < counts[1] == counts[2]

    def test_broken_records_are_named(self, tmp_path, records, tokenizer):
        rows = list(records)
        rows[2]["chosen"] = None
        with pytest.raises(StepDPOError, match="row 2 of the train dataset: field 'chosen' must be a string, got"):
            self.make(tmp_path, Dataset.from_list(rows), tokenizer)

    def test_other_datasets_are_trls(self, tmp_path, rows, tokenizer, packed):
        theirs = make_trainer(tmp_path, rows, tokenizer, max_steps=3)
        ours = make_trainer(tmp_path, rows, tokenizer, max_steps=3, trainer_class=StepDPOTRLTrainer)
        theirs.train()
        assert not packed
        ours.train()
        assert_same(history(ours), history(theirs))
