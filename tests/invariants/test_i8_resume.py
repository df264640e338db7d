"""I8: a run that is stopped at any moment and resumed gives the same losses and weights, bit for bit."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from stepdpo_kernels.data import StepPairDataset
from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import assert_same_weights, entries, losses, make_config, make_pairs, weights


class StopAfter(TrainerCallback):
    """Ctrl-C at the end of a step, before it is logged or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def pairs(step_records, tiny_tokenizer, tmp_path) -> StepPairDataset:
    return make_pairs(step_records(5, 4), tiny_tokenizer(), tmp_path)


@pytest.fixture
def start(tiny_model, pairs, tmp_path) -> Callable[..., StepDPOTrainer]:
    """start(name, callbacks, lora=False, **fields): a trainer of two epochs of five steps that saves every second."""

    def make(name: str, *callbacks: TrainerCallback, lora: bool = False, **fields: Any) -> StepDPOTrainer:
        from peft import LoraConfig

        settings = {
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "output_dir": str(tmp_path / name),
        }
        peft_config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None
        config = make_config(tmp_path, **settings | fields)
        return StepDPOTrainer(
            tiny_model(), config, pairs, eval_dataset=pairs[:5], callbacks=list(callbacks), peft_config=peft_config
        )

    return make


def history(trainer: StepDPOTrainer) -> list[dict[str, float]]:
    """What was logged, but for times."""
    timed = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timed)}
        for entry in trainer.state.log_history
        if "train_loss" not in entry  # of the steps since the last start
    ]


@pytest.mark.parametrize(
    ("stop", "fields"),
    [
        (3, {}),  # in the first epoch
        (5, {"save_steps": 5}),  # at its end, nothing saved yet
        (6, {"save_steps": 5}),  # the last checkpoint is at its end
        (9, {}),  # in the second
        (10, {}),  # after the last step
        (5, {"bf16": True}),
        (5, {"lora": True}),
        (5, {"gradient_checkpointing": True, "max_tokens_per_batch": 8192}),
        (7, {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}),
        (5, {"save_total_limit": 1, "share": "none"}),
        (5, {"reference": "none"}),
        (5, {"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 3}),
    ],
    ids=str,
)
def test_i8_stopped_and_resumed_is_as_if_undisturbed(start, tmp_path, stop, fields):
    undisturbed = start("undisturbed", **fields)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        start("stopped", StopAfter(stop), **fields).train()
    assert f"checkpoint-{stop}" not in entries(tmp_path / "stopped")
    torch.manual_seed(12345)  # another process has other random numbers
    every = fields.get("save_steps", 2)
    if stop <= every:  # nothing is left, and the run begins again
        assert entries(tmp_path / "stopped") == []
        resumed = start("stopped", **fields)
        resumed.train()
    else:
        resumed = start("stopped", **fields)
        resumed.train(resume_from_checkpoint=True)
        assert resumed._initial_global_step == (stop - 1) // every * every
    assert len(losses(resumed)) == 10
    if "load_best_model_at_end" in fields:
        assert Path(resumed.state.best_model_checkpoint).name == Path(undisturbed.state.best_model_checkpoint).name
    assert history(resumed) == history(undisturbed)
    assert_same_weights(weights(resumed.model), weights(undisturbed.model))
    assert entries(tmp_path / "stopped") == entries(tmp_path / "undisturbed")


def test_i8_stopped_twice(start):
    undisturbed = start("undisturbed")
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        start("stopped", StopAfter(3)).train()
    with pytest.raises(KeyboardInterrupt):
        start("stopped", StopAfter(7)).train(resume_from_checkpoint=True)
    resumed = start("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(undisturbed)
    assert_same_weights(weights(resumed.model), weights(undisturbed.model))


def test_i8_from_an_earlier_checkpoint_over_later_ones(start, tmp_path):
    """The checkpoints that the run comes by again are replaced."""
    undisturbed = start("run")
    undisturbed.train()
    before = (tmp_path / "run" / "checkpoint-8" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "checkpoint-8" / "mark").touch()
    again = start("run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert history(again) == history(undisturbed)
    assert_same_weights(weights(again.model), weights(undisturbed.model))
    assert (tmp_path / "run" / "checkpoint-8" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "checkpoint-8" / "mark").exists()
    assert entries(tmp_path / "run") == [
        *sorted(f"checkpoint-{step}" for step in (2, 4, 6, 8, 10)),
        "stepdpo_run.json",
    ]


def test_i8_into_a_new_folder(start, tmp_path):
    undisturbed = start("first")
    undisturbed.train()
    moved = start("second")
    moved.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-6"))
    assert history(moved) == history(undisturbed)
    assert_same_weights(weights(moved.model), weights(undisturbed.model))
    assert entries(tmp_path / "second") == ["checkpoint-10", "checkpoint-8", "stepdpo_run.json"]


# ---- in the middle of saving ----------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def half_model(trainer: StepDPOTrainer, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: str, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        stop()

    monkeypatch.setattr(trainer.model, "save_pretrained", save)


def half_optimizer(trainer: StepDPOTrainer, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: str) -> None:
        (Path(folder) / "optimizer.pt").write_bytes(b"half")
        stop()

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", save)


def half_state(trainer: StepDPOTrainer, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Any, path: str) -> None:
        Path(path).write_text('{"epoch": ')
        stop()

    monkeypatch.setattr("transformers.trainer_callback.TrainerState.save_to_json", save)


def before_renaming(trainer: StepDPOTrainer, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepdpo_kernels.trainer.trainer.put_in_place", lambda *places: stop())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("No space left on device")], ids=["ctrl-c", "full"])
@pytest.mark.parametrize("where", [half_model, half_optimizer, half_state, before_renaming])
def test_i8_stopped_while_saving(start, tmp_path, monkeypatch, where, failure):
    class BreakSaving(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def stop() -> None:
                raise failure

            if state.global_step == 3:  # checkpoint-2 is there, checkpoint-4 is next
                self.before = content(tmp_path / "stopped")
                where(trainer, stop, patch)

    breaking = BreakSaving()
    with monkeypatch.context() as patch:
        trainer = start("stopped", breaking)
        with pytest.raises(failure if isinstance(failure, type) else StepDPOError) as raised:
            trainer.train()
        if isinstance(failure, OSError):
            assert "checkpoint-4 could not be written" in str(raised.value)
    assert entries(tmp_path / "stopped") == ["checkpoint-2", "stepdpo_run.json"]
    assert content(tmp_path / "stopped") == breaking.before

    undisturbed, resumed = start("undisturbed"), start("stopped")
    undisturbed.train()
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(undisturbed)
    assert_same_weights(weights(resumed.model), weights(undisturbed.model))


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(("models", "said"), [(0.5, "File too large"), (1.5, "inline_container")])
def test_i8_a_full_disk(start, tmp_path, models, said):
    """Room for half a model, and for the model but not for what the optimiser keeps of it."""

    class Fill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                self.before = content(tmp_path / "stopped")
                size = (tmp_path / "stopped" / "checkpoint-2" / "model.safetensors").stat().st_size
                room.enter_context(full_at(int(models * size)))

    fill = Fill()
    with pytest.raises(StepDPOError, match="checkpoint-4 could not be written") as raised, ExitStack() as room:
        start("stopped", fill).train()
    last = str(tmp_path / "stopped" / "checkpoint-2")
    assert said in str(raised.value)
    assert f"the last checkpoint, {last!r}, is as it was. See to space and permissions" in str(raised.value)
    assert content(tmp_path / "stopped") == fill.before
    undisturbed, resumed = start("undisturbed"), start("stopped")
    undisturbed.train()
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(undisturbed)


def test_i8_no_room_for_the_final_model(start, tmp_path):
    trainer = start("run", max_steps=2)
    trainer.train()
    before = content(tmp_path / "run")
    with full_at(10_000), pytest.raises(StepDPOError, match="the model could not be written to"):
        trainer.save_model()
    assert content(tmp_path / "run") == before
    trainer.save_model()
    assert "model.safetensors" in entries(tmp_path / "run")


def test_i8_a_folder_that_cannot_be_written_to_is_found_before_anything_is_computed(start, locked):
    with pytest.raises(StepDPOError, match=r"cannot be written to: .* is read-only for this user"):
        start(str(locked / "run"))


@pytest.fixture
def locked(monkeypatch) -> Iterator[Path]:
    """A folder that nobody but its owner may write to, asked as another user where the tests run as root."""
    monkeypatch.setattr("stepdpo_kernels.trainer.ref_logps.compute_ref_logps", None)
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        folder.rmdir()


def test_i8_killed_while_an_old_checkpoint_is_removed(start, tmp_path, monkeypatch):
    """One that is half gone is no checkpoint any more."""
    remove = shutil.rmtree

    def half(folder: Path, **options: Any) -> None:
        for weights_file in Path(folder).glob("checkpoint-2.old/*.safetensors"):
            weights_file.unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            start("stopped", save_total_limit=1).train()
    left = [path for path in (tmp_path / "stopped").glob("checkpoint-*") if (path / "model.safetensors").exists()]
    assert left == list((tmp_path / "stopped").glob("checkpoint-*")) == [tmp_path / "stopped" / "checkpoint-4"]
    resumed = start("stopped", save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert entries(tmp_path / "stopped") == ["checkpoint-10", "stepdpo_run.json"]


def test_i8_killed_while_saving(start, tmp_path):
    """SIGKILL leaves the scratch folder behind: it is no checkpoint, and the next save removes it."""
    undisturbed = start("undisturbed")
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        start("stopped", StopAfter(5)).train()
    half = tmp_path / "stopped" / ".incomplete" / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    resumed = start("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(undisturbed)
    assert entries(tmp_path / "stopped") == entries(tmp_path / "undisturbed")


def test_i8_killed_before_the_first_checkpoint(start, tmp_path):
    """The run file says whose folder it is; resuming begins at the beginning."""
    undisturbed = start("undisturbed")
    undisturbed.train()
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "undisturbed" / "stepdpo_run.json", tmp_path / "killed")
    with pytest.raises(StepDPOError, match="holds another run"):
        start("killed").train()
    resumed = start("killed")
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(undisturbed)
    with pytest.raises(StepDPOError, match="seed 42 \\(now 1\\)"):
        start("killed", seed=1).train(resume_from_checkpoint=True)


def test_i8_a_failed_start_can_be_repeated(start, tmp_path):
    """Out of memory in the first step, say: the same command works again, with another budget."""
    with pytest.raises(KeyboardInterrupt):
        start("run", StopAfter(1)).train()
    assert entries(tmp_path / "run") == []
    start("run", max_tokens_per_batch=400, max_steps=2).train()
    assert entries(tmp_path / "run") == ["checkpoint-2", "stepdpo_run.json"]


def test_i8_the_final_model_is_whole_or_absent(start, tmp_path, monkeypatch):
    trainer = start("run", max_steps=2)
    trainer.train()
    trainer.save_model()
    before = content(tmp_path / "run")
    assert {"model.safetensors", "config.json", "training_args.bin"} <= before.keys()

    def half(folder: str, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.model, "save_pretrained", half)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert content(tmp_path / "run") == before


# ---- what cannot be resumed -----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(start, tmp_path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        start("run", StopAfter(3)).train()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": "pair"}, "share tree (now pair)"),
        ({"max_tokens_per_batch": 300}, "max_tokens_per_batch 250 (now 300)"),
        ({"pairs_per_step": 5}, "pairs_per_step 4 (now 5)"),
        ({"seed": 7, "bf16": True}, "bf16 False (now True), seed 42 (now 7)"),
        ({"reference": "none"}, "reference precomputed (now none)"),
    ],
    ids=str,
)
def test_i8_other_packing_is_refused(start, stopped, fields, message):
    before = content(stopped)
    with pytest.raises(StepDPOError) as error:
        start("run", **fields).train(resume_from_checkpoint=True)
    assert str(error.value).startswith(f"cannot resume {str(stopped / 'checkpoint-2')!r}: that run began with ")
    assert str(error.value).endswith(message)
    assert content(stopped) == before


@pytest.mark.parametrize("reference", ["precomputed", "none"])
def test_i8_another_model_or_other_pairs_are_refused(tiny_model, pairs, start, tmp_path, reference):
    with pytest.raises(KeyboardInterrupt):
        start("run", StopAfter(3), reference=reference).train()
    before = content(tmp_path / "run")
    config = make_config(tmp_path, num_train_epochs=2, reference=reference)
    others = StepPairDataset([pairs[0], *pairs[2:], pairs[1]])
    for model, data, message in (
        (tiny_model(seed=1), pairs, "other weights of the reference$"),
        (tiny_model(), others, "other pairs$"),
        (tiny_model(), pairs[:19], "other pairs$"),
        (tiny_model("qwen2"), others, "other weights of the reference, other pairs$"),
    ):
        with pytest.raises(StepDPOError, match=message):
            StepDPOTrainer(model, config, data).train(resume_from_checkpoint=True)
        assert content(tmp_path / "run") == before


def test_i8_other_evaluation_pairs_are_no_other_run(tiny_model, pairs, stopped, tmp_path):
    config = make_config(tmp_path, num_train_epochs=2)
    trainer = StepDPOTrainer(tiny_model(), config, pairs, eval_dataset=pairs[8:12])
    trainer.train(resume_from_checkpoint=True)
    assert len(losses(trainer)) == 10


def test_i8_nothing_to_resume(start, stopped, tmp_path):
    with pytest.raises(StepDPOError, match="holds no run to resume"):
        start("new").train(resume_from_checkpoint=True)
    for missing in ("nowhere", str(stopped)):
        with pytest.raises(StepDPOError, match=r"lacks trainer_state\.json and optimizer\.pt"):
            start("new").train(resume_from_checkpoint=missing)
    (stopped / "checkpoint-2" / "optimizer.pt").unlink()  # as save_only_model leaves it
    with pytest.raises(StepDPOError, match=r"lacks optimizer\.pt"):
        start("run").train(resume_from_checkpoint=True)
    assert entries(tmp_path / "new") == []


def test_i8_a_checkpoint_elsewhere_does_not_open_the_folder_of_another_run(start, stopped, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start("other", StopAfter(3)).train()
    before = content(stopped)
    with pytest.raises(StepDPOError, match="holds another run"):
        start("run").train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))
    assert content(stopped) == before
