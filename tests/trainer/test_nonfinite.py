"""Losses and gradients that are not finite: the pairs are named, and the weights stay as they were."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from stepdpo_kernels.trainer import StepDPOTrainer
from stepdpo_kernels.trainer.nonfinite import Verdict, skips_on_device, unwrapped
from stepdpo_kernels.types import StepDPOError
from tests.trainer.training import assert_same_weights, entries, losses, steps_of, watch, weights

BAD = 5  # the number of the pair
OPTIMS = ("adamw_torch_fused", "adamw_torch")  # an update is refused by the device, and by the host


class Weights(TrainerCallback):
    """Copies of the weights at the end of each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append(weights(model))


def break_pair(trainer: StepDPOTrainer, number: int) -> None:
    """The log-probs of one pair overflow whenever it is trained on."""
    packed = trainer.loss.packed

    def overflowing(hidden, weight, batch, *args, **options):
        output = packed(hidden, weight, batch, *args, **options)
        if not torch.is_grad_enabled() or number not in batch.pair_index:
            return output
        margins = torch.where(batch.pair_index == number, float("nan"), output.margins)
        return output._replace(loss=output.loss * float("nan"), margins=margins)

    trainer.loss.packed = overflowing  # type: ignore[method-assign]


def break_gradient(trainer: StepDPOTrainer, step: int) -> None:
    """The gradient of one weight overflows in one step."""
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda g: g * (float("inf") if trainer.state.global_step == step - 1 else 1.0))


def break_loss(trainer: StepDPOTrainer, step: int) -> None:
    """The loss of one step overflows, and no gradient does."""
    packed = trainer.loss.packed

    def overflowing(*args, **options):
        output = packed(*args, **options)
        bad = torch.is_grad_enabled() and trainer.state.global_step == step - 1
        return output._replace(loss=output.loss + float("inf")) if bad else output

    trainer.loss.packed = overflowing  # type: ignore[method-assign]


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_loss_stops_the_run_before_the_weights_change(tiny_model, pairs, config, optim):
    copies = Weights()
    trainer = StepDPOTrainer(tiny_model(), config(optim=optim), pairs, callbacks=[copies])
    break_pair(trainer, BAD)
    seen = watch(trainer)
    with pytest.raises(StepDPOError) as raised:
        trainer.train()
    done = next(number for number, step in enumerate(steps_of(seen, 4, len(pairs))) if BAD in step)
    message = str(raised.value)
    assert f"step {done + 1}: not finite: the log-probs of pair '{pairs[BAD].id}' are not finite" in message
    assert "on_nonfinite='skip'" in message
    assert BAD in {i for batch, _, training in seen if training for i in batch.pair_index.tolist()}
    assert done  # the order of this seed draws it later than in the first step
    assert_same_weights(weights(trainer.model), copies.after[done - 1])


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_gradient_stops_the_run_and_the_last_checkpoint_serves(tiny_model, pairs, config, tmp_path, optim):
    args = {"save_strategy": "steps", "save_steps": 1, "optim": optim}
    trainer = StepDPOTrainer(tiny_model(), config(**args), pairs)
    seen = watch(trainer)
    break_gradient(trainer, step=3)
    with pytest.raises(StepDPOError) as raised:
        trainer.train()
    third = steps_of(seen, 4, len(pairs))[2]
    assert "step 3: not finite: every loss is finite but the gradient is not, in a step of pairs" in str(raised.value)
    assert all(repr(pairs[i].id) in str(raised.value) for i in third)
    assert {e for e in entries(tmp_path / "run") if "check" in e} == {"checkpoint-1", "checkpoint-2"}
    resumed = StepDPOTrainer(tiny_model(), config(**args), pairs)
    resumed.train(resume_from_checkpoint=True)
    undisturbed = StepDPOTrainer(tiny_model(), config(output_dir=str(tmp_path / "other"), optim=optim), pairs)
    undisturbed.train()
    assert_same_weights(weights(resumed.model), weights(undisturbed.model))


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("logging_steps", [1, 6])
def test_a_skipped_step_changes_nothing(tiny_model, pairs, config, caplog, logging_steps, optim):
    copies = Weights()
    args = config(on_nonfinite="skip", logging_steps=logging_steps, weight_decay=0.1, warmup_steps=0, optim=optim)
    trainer = StepDPOTrainer(tiny_model(), args, pairs, callbacks=[copies])
    break_pair(trainer, BAD)
    seen = watch(trainer)
    trainer.train()
    steps = steps_of(seen, 4, len(pairs))
    skipped = next(number for number, step in enumerate(steps) if BAD in step)
    assert 0 < skipped < 5
    for number in range(1, 6):
        same = all(torch.equal(copies.after[number][n], copies.after[number - 1][n]) for n in copies.after[0])
        assert same == (number == skipped)
    assert f"step {skipped + 1}: not finite: the log-probs of pair '{pairs[BAD].id}'" in caplog.text
    history = trainer.state.log_history
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert [entry["steps/skipped"] for entry in history if "steps/skipped" in entry] == [1]
    assert len(losses(trainer)) == (5 if logging_steps == 1 else 1)
    whole = [0.0] * 6  # the loss of each step, from its forward passes
    for batch, output, training in seen:
        if training:
            number = next(n for n, step in enumerate(steps) if int(batch.pair_index[0]) in step)
            whole[number] += output.loss.item()
    assert math.isnan(whole.pop(skipped))
    assert losses(trainer) == pytest.approx(whole if logging_steps == 1 else [sum(whole) / 5], rel=1e-5)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("logging_steps", [1, 6])
def test_a_skipped_gradient(tiny_model, pairs, config, logging_steps, optim):
    """Its finite loss is in no log."""
    copies = Weights()
    args = config(on_nonfinite="skip", logging_steps=logging_steps, optim=optim)
    trainer = StepDPOTrainer(tiny_model(), args, pairs, callbacks=[copies])
    break_gradient(trainer, step=3)
    seen = watch(trainer)
    trainer.train()
    steps = [set(step) for step in steps_of(seen, 4, len(pairs))]
    taken = [
        sum(output.loss.item() for batch, output, _ in seen if set(batch.pair_index.tolist()) <= step) for step in steps
    ]
    del taken[2]
    assert losses(trainer) == pytest.approx(taken if logging_steps == 1 else [sum(taken) / 5], rel=1e-5)
    assert_same_weights(copies.after[2], copies.after[1])
    assert not torch.equal(copies.after[3]["lm_head.weight"], copies.after[2]["lm_head.weight"])
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# ---- verdicts that the host reads a step later ---------------------------------------------------------------------


class Optimiser(TrainerCallback):
    """Copies of the optimiser's state at the end of each step, and the number of passes of evaluation."""

    def __init__(self) -> None:
        self.after: list[dict[int, dict[str, torch.Tensor]]] = []
        self.evaluated = 0

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.after.append(copy.deepcopy(optimizer.state_dict()["state"]))

    def on_prediction_step(self, args, state, control, **kwargs):
        self.evaluated += 1


class Run(NamedTuple):
    """What came of a run with a fault."""

    trainer: StepDPOTrainer
    message: str | None
    weights: list[dict[str, torch.Tensor]]  # after each step
    optimiser: Optimiser
    history: list[dict[str, Any]]  # without times
    entries: list[str]


@pytest.fixture
def run(tiny_model, pairs, config, tmp_path, monkeypatch) -> Callable[..., Run]:
    """run(name, break_it, step, on_device=..., **fields): six steps, of which one is broken, none of them logged."""

    def train(name: str, break_it: Callable[..., None], step: int, *, on_device: bool, **fields: Any) -> Run:
        settings = {"weight_decay": 0.1, "warmup_steps": 0, "logging_steps": 100, "output_dir": str(tmp_path / name)}
        copies, optimiser = Weights(), Optimiser()
        with monkeypatch.context() as patched:
            if not on_device:
                patched.setattr("stepdpo_kernels.trainer.trainer.skips_on_device", lambda *args: False)
            trainer = StepDPOTrainer(
                tiny_model(), config(**settings | fields), pairs, eval_dataset=pairs[:4], callbacks=[copies, optimiser]
            )
            break_it(trainer, step)
            message = None
            try:
                trainer.train()
            except StepDPOError as error:
                message = str(error)
        history = [
            {name: value for name, value in entry.items() if not name.endswith(("second", "runtime"))}
            for entry in trainer.state.log_history
        ]
        return Run(trainer, message, copies.after, optimiser, history, entries(tmp_path / name))

    return train


WHEN: dict[str, dict[str, Any]] = {
    "never": {},
    "logs": {"logging_steps": 1},
    "saves": {"save_strategy": "steps", "save_steps": 1},
    "evaluates": {"eval_strategy": "steps", "eval_steps": 1},
    "logs after it saves": {"logging_strategy": "epoch", "save_strategy": "steps", "save_steps": 1},
}


@pytest.mark.parametrize("step", [1, 3, 6], ids=["first", "middle", "last"])
@pytest.mark.parametrize("break_it", [break_loss, break_gradient], ids=["loss", "gradient"])
@pytest.mark.parametrize("when", WHEN)
def test_the_device_refuses_what_the_host_would(run, caplog, when, break_it, step):
    host = run("host", break_it, step, on_device=False, **WHEN[when])
    device = run("device", break_it, step, on_device=True, **WHEN[when])
    assert host.message is not None
    assert device.message == host.message
    assert host.message.startswith(f"step {step}: not finite: ")
    assert f"checkpoint-{step}" not in device.entries
    assert device.entries == host.entries
    assert device.history == host.history
    assert device.optimiser.evaluated == host.optimiser.evaluated
    assert_same_weights(weights(device.trainer.model), weights(host.trainer.model))
    state = unwrapped(device.trainer.optimizer).state_dict()["state"]
    if step > 1:
        assert_same_weights(weights(device.trainer.model), device.weights[step - 2])
        assert_same_state(state, device.optimiser.after[step - 2])
    else:
        assert not any(value.any() for entry in state.values() for value in entry.values())

    fields = {"on_nonfinite": "skip", **WHEN[when]}
    host = run("host skips", break_it, step, on_device=False, **fields)
    caplog.clear()
    device = run("device skips", break_it, step, on_device=True, **fields)
    assert [r.message.partition(": ")[0] for r in caplog.records if "is skipped" in r.message] == [f"step {step}"]
    assert device.message is host.message is None
    assert device.entries == host.entries
    assert device.history == host.history
    assert json.loads(json.dumps(device.history, allow_nan=False)) == device.history
    assert sum(entry.get("steps/skipped", 0) for entry in device.history) == (when.startswith("logs"))
    assert device.trainer._meter.totals()[:4] == host.trainer._meter.totals()[:4]
    assert len(device.weights) == 6
    for a, b in zip(device.weights, host.weights, strict=True):
        assert_same_weights(a, b)
    assert_same_state(device.optimiser.after[-1], host.optimiser.after[-1])
    assert not hasattr(unwrapped(device.trainer.optimizer), "found_inf")


def assert_same_state(a: dict[int, dict[str, torch.Tensor]], b: dict[int, dict[str, torch.Tensor]]) -> None:
    """Of optimisers, bit for bit."""
    assert a.keys() == b.keys()
    assert {k for entry in a.values() for k in entry} == {"step", "exp_avg", "exp_avg_sq"}
    assert [(i, k) for i in a for k in a[i] if not torch.equal(a[i][k], b[i][k])] == []


class Reads(TrainerCallback):
    """In which order steps are begun and made, and verdicts on them read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        read = Verdict.read

        def watched(verdict: Verdict, *args: Any) -> str | None:
            self.order.append(f"read {verdict.step}")
            return read(verdict, *args)

        monkeypatch.setattr(Verdict, "read", watched)

    def on_step_begin(self, args, state, control, **kwargs):
        self.order.append(f"begin {state.global_step + 1}")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.order.append(f"update {state.global_step + 1}")


@pytest.mark.parametrize("optim", OPTIMS)
def test_when_the_host_looks(tiny_model, pairs, config, monkeypatch, optim):
    """Not before the next step is on its way or a log is due, where the device can refuse an update by itself."""
    looks = Reads(monkeypatch)
    StepDPOTrainer(tiny_model(), config(logging_steps=3, max_steps=4, optim=optim), pairs, callbacks=[looks]).train()
    order = ["begin 1 update 1 begin 2 read 1 update 2 begin 3 read 2 update 3 read 3", "begin 4 update 4 read 4"]
    if optim == "adamw_torch":
        order = [f"begin {n} read {n} update {n}" for n in range(1, 5)]
    assert " ".join(looks.order) == " ".join(order)


class Asks(TrainerCallback):
    """Calls something at an event of a step, and lets what it raises pass."""

    done: bool
    raised: str

    def __init__(self, event: str, step: int, call: Callable[[], Any]) -> None:
        def at_event(args, state, control, **kwargs):
            if state.global_step == step and not self.done:
                self.done = True
                try:
                    call()
                except StepDPOError as error:
                    self.raised = str(error)

        self.done, self.raised = False, ""
        setattr(self, event, at_event)


@pytest.mark.parametrize("call", ["evaluate", "predict", "save_model"])
def test_what_callbacks_ask_for_waits_for_the_verdict(tiny_model, pairs, config, tmp_path, call):
    """And a run is stopped also where they let the error pass."""
    trainer = StepDPOTrainer(tiny_model(), config(logging_steps=100), pairs, eval_dataset=pairs[:4])
    seen = watch(trainer)
    given = {"evaluate": (), "predict": (trainer.eval_dataset,), "save_model": (str(tmp_path / "saved"),)}[call]
    asks = Asks("on_step_end", 3, lambda: getattr(trainer, call)(*given))
    trainer.add_callback(asks)
    break_gradient(trainer, step=3)
    with pytest.raises(StepDPOError) as raised:
        trainer.train()
    assert asks.raised == str(raised.value)
    assert asks.raised.startswith("step 3: not finite")
    assert all(training for _, _, training in seen)
    assert not (tmp_path / "saved").exists()


def test_a_verdict_that_is_read_before_the_update(run, tiny_model, pairs, config, tmp_path):
    """The update is refused all the same."""
    args = config(on_nonfinite="skip", logging_steps=100, weight_decay=0.1, warmup_steps=0)
    copies = Weights()
    trainer = StepDPOTrainer(tiny_model(), args, pairs, callbacks=[copies])
    asks = Asks("on_pre_optimizer_step", 2, lambda: trainer.save_model(str(tmp_path / "saved")))
    trainer.add_callback(asks)
    break_gradient(trainer, step=3)
    trainer.train()
    assert asks.done
    assert_same_weights(copies.after[2], copies.after[1])
    host = run("host", break_gradient, 3, on_device=False, on_nonfinite="skip")
    assert_same_weights(weights(trainer.model), host.weights[-1])


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_end"])
def test_a_run_that_is_interrupted_leaves_no_verdict(tiny_model, pairs, config, event):
    def interrupt() -> None:
        raise KeyboardInterrupt

    trainer = StepDPOTrainer(tiny_model(), config(logging_steps=100), pairs, eval_dataset=pairs[:4])
    trainer.add_callback(Asks(event, 3, interrupt))
    break_gradient(trainer, step=3 if event == "on_step_end" else 4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not hasattr(unwrapped(trainer.optimizer), "found_inf")
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_checkpoint_of_another_form_of_the_optimiser(tiny_model, pairs, config, tmp_path):
    """It brings the form along, which the host has to ask then."""
    args = {"save_strategy": "steps", "save_steps": 2, "on_nonfinite": "skip", "logging_steps": 100}
    StepDPOTrainer(tiny_model(), config(optim="adamw_torch", **args), pairs).train()
    copies = Weights()
    trainer = StepDPOTrainer(tiny_model(), config(**args), pairs, callbacks=[copies])
    break_gradient(trainer, step=5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not skips_on_device(unwrapped(trainer.optimizer), trainer.accelerator)
    assert_same_weights(copies.after[2], copies.after[1])
    assert not torch.equal(copies.after[3]["lm_head.weight"], copies.after[2]["lm_head.weight"])


class Own(torch.optim.AdamW):
    """Somebody's, whose step may be another."""


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_what_an_optimiser_leaves_as_it_is(kind, options, bad):
    """Bit for bit, whatever the gradient: what is relied on here of torch."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((37, 5), (3,), ())]
    optimiser = kind(parameters, lr=0.1, fused=True, **options)
    assert skips_on_device(optimiser, Accelerator(cpu=True))
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimiser.step()
    before = [p.detach().clone() for p in parameters], copy.deepcopy(optimiser.state_dict()["state"])
    for p in parameters:
        p.grad = torch.full_like(p, bad)
    optimiser.found_inf = torch.ones(())
    optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before[0], strict=True))
    after = optimiser.state_dict()["state"]
    assert all(torch.equal(after[i][k], value) for i, entry in before[1].items() for k, value in entry.items())
    optimiser.found_inf = torch.zeros(())
    optimiser.step()
    assert not torch.equal(parameters[0], before[0][0])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.AdamW([{"params": p, "fused": False}], fused=True),
        lambda p: torch.optim.SGD(p, momentum=0.9, fused=True),
        lambda p: Own(p, fused=True),
    ],
)
def test_whom_the_host_has_to_ask(make):
    assert not skips_on_device(make([torch.zeros(3, requires_grad=True)]), Accelerator(cpu=True))


def test_a_norm_that_nobody_knows(tiny_model, pairs, config, monkeypatch, tmp_path):
    """DeepSpeed computes none in float32 where it does not shard."""
    trained = StepDPOTrainer(tiny_model(), config(max_grad_norm=0), pairs)
    trained.train()
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *args, **options: None)
    without = StepDPOTrainer(tiny_model(), config(max_grad_norm=0, output_dir=str(tmp_path / "without")), pairs)
    without.train()
    assert_same_weights(weights(without.model), weights(trained.model))
    assert "grad_norm" not in without.state.log_history[0]


def test_weights_that_overflow_are_found_in_the_reference(tiny_model, pairs, config, tmp_path):
    """A token's embedding is infinite: the pairs that have it are named, and nothing is cached."""
    model = tiny_model()
    token = int(pairs[BAD].chosen_ids[0])
    having = [p for p in pairs if token in [*p.prefix_ids, *p.chosen_ids[:-1], *p.rejected_ids[:-1]]]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")
    trainer = StepDPOTrainer(model, config(), pairs)
    with pytest.raises(StepDPOError, match="train_dataset: the reference's log-probs of pair") as raised:
        trainer.train()
    assert all(repr(p.id) in str(raised.value) for p in having)
    assert having
    assert entries(tmp_path / "cache") == []
    assert entries(Path(trainer.args.output_dir)) == []
