"""Training steps: a process for each trainer, which takes its turns in rounds over all of them.

First the reference log-probs of the pairs of each optimiser step, then the steps, the first ones of an epoch over all
pairs. The time of round k is that of both for the k-th step. The first round is warm-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.environment import processor
from benchmarks.measure import TIMED, Worker
from benchmarks.registry import Case, Workload
from benchmarks.rows import Row
from benchmarks.runner import NOT_RUN, RESERVE_SECONDS, Answer, Context, broken_off, ratio_rows, row_of

WORKER = "benchmarks.suites.step.trainers_worker"
# What a provider's name means; its number is what a forward pass takes at once: pairs of TRL.
SETTINGS: dict[str, dict[str, Any]] = {
    "products": {"trainer": "products"},
    "ours": {"trainer": "ours"},
    "ours-grouped": {"trainer": "ours", "sampling": "grouped"},
    "ours-pair": {"trainer": "ours", "share": "pair"},
    "ours-none": {"trainer": "ours", "share": "none"},
    "trl": {"trainer": "trl", "at_once": 8},
    "trl-sorted": {"trainer": "trl", "at_once": 8, "sorted": True},
    "trl-1": {"trainer": "trl", "at_once": 1},
    "trl-32": {"trainer": "trl", "at_once": 32, "sorted": True},
    "trl-packed": {"trainer": "trl", "at_once": 8, "packed": True},
}
DEFAULTS: dict[str, Any] = {"sampling": "shuffle", "share": "tree", "sorted": False, "packed": False}
TOLERANCE = 1e-3  # in float32: of log-probs, losses and the norm of the gradient, as the trainers log them
VERIFIED = {"dtype": "float32", "pairs_per_step": 8, "max_tokens": 2048}
# Two steps on the same pairs: the second one says what the first one's update did.
CHECKED = {"steps": 2, "repeat": True, "bf16": False, "learning_rate": 1e-4}
LEARNING_RATE = 5e-7  # the paper's
PAIRS = 256  # made-up ones, of those that are verified


def verify(workload: Workload, cases: list[Case], context: Context) -> dict[tuple[str, tuple[Any, ...]], Answer]:
    """What two steps on the same pairs log in float32, beside the definition in float64."""
    providers = context.providers(workload)
    kinds = [(p.name, mode) for mode in dict.fromkeys(case["mode"] for case in cases) for p in providers]
    found: dict[tuple[str, tuple[Any, ...]], Answer] = {
        (name, (mode,)): {"status": "ok", "errors": {}} for name, mode in kinds
    }
    checked = [(name, mode) for name, mode in kinds if SETTINGS[name]["trainer"] != "products"]
    # The definition needs to know which pairs are drawn, and nothing else of a trainer.
    definitions = {(drawn_by(name), mode): name for name, mode in checked}
    with inputs_of({"model": "tiny", "dtype": "float32"}, "", "", PAIRS) as (model, data):

        def first(name: str, mode: str, changes: dict[str, Any]) -> Answer:
            settings = settings_of(name, {**VERIFIED, "mode": mode}, context, model, data)
            return two_steps({**settings, **CHECKED, **changes}, context)

        def define(key: tuple[str, str]) -> Answer:
            return first(definitions[key], key[1], {"trainer": "oracle"})

        true = dict(zip(definitions, context.side_by_side(define, definitions), strict=True))
        answers = context.side_by_side(lambda kind: first(kind[0], kind[1], {}), checked)
    for (name, mode), answer in zip(checked, answers, strict=True):
        definition = true[drawn_by(name), mode]
        if definition["status"] != "ok":
            note = f"the float64 definition of a training step: {definition['note']}"
            found[name, (mode,)] = {"status": definition["status"], "note": note}
        else:
            found[name, (mode,)] = judged(answer, definition) if answer["status"] == "ok" else answer
    return found


def drawn_by(name: str) -> str:
    return str({**DEFAULTS, **SETTINGS[name]}["sampling"])


LOGGED = ("logps_chosen", "logps_rejected", "grad_norm", "loss", "second_loss")


def judged(told: Answer, true: Answer) -> Answer:
    errors = {f"error_{name}": abs(told[name] - true[name]) / abs(true[name]) for name in LOGGED}
    if all(error <= TOLERANCE for error in errors.values()):
        return {"status": "ok", "errors": errors}
    note = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    return {"status": "wrong", "note": f"relative to float64: {note}", "errors": errors}


def two_steps(settings: dict[str, Any], context: Context) -> Answer:
    """What the first step logged, and the second one's loss."""
    answers: list[Answer] = []
    with trainer_process(context, {}) as (worker, folder):
        for _ in range(1 + 2 * settings["steps"]):  # loaded, references of each step, its steps
            if context.left() < RESERVE_SECONDS:
                return dict(NOT_RUN)
            answers.append(told(context.ask(worker, {**settings, "folder": folder})))
            if answers[-1]["status"] != "ok":
                return answers[-1]
    return {**answers[-2], "second_loss": answers[-1]["loss"]}


@contextmanager
def trainer_process(context: Context, environment: dict[str, str]) -> Iterator[tuple[Worker, str]]:
    with (
        TemporaryDirectory(prefix="stepdpo-") as folder,
        context.open(WORKER, {"TMPDIR": folder, **environment}) as worker,
    ):
        yield worker, folder


def told(answer: Answer) -> Answer:
    """The answer; a package that is missing is told from other failures."""
    note = answer.get("note", "")
    if answer["status"] == "failed" and "ModuleNotFoundError" in note:
        return {"status": "absent", "note": note[note.index("ModuleNotFoundError") :]}
    if answer["status"] == "failed" and "OutOfMemoryError" in note:
        return {"status": "out of memory", "note": note}
    return answer


@contextmanager
def inputs_of(case: Case, model: str, data: str, count: int) -> Iterator[tuple[str, str]]:
    """(model, data): those that are named, or a folder with random weights and a file of so many made-up pairs."""
    from benchmarks.suites.step.models import write_model, write_pairs

    with TemporaryDirectory(prefix="stepdpo-") as folder:
        made, pairs = Path(folder) / "model", Path(folder) / "pairs.jsonl"
        if data:
            yield plain_folder(model, case["dtype"], str(made)), data
        else:
            write_model(made, case["model"], case["dtype"])
            write_pairs(pairs, count)
            yield str(made), str(pairs)


def plain_folder(model: str, dtype: str, folder: str) -> str:
    """The model, or what a GGUF file holds as a plain folder: dequantising takes more memory than training."""
    if Path(model).suffix != ".gguf" and not (Path(model).is_dir() and not (Path(model) / "config.json").exists()):
        return model
    from stepdpo_kernels.trainer import load_model, load_tokenizer

    load_model(model, dtype).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def settings_of(name: str, case: Case, context: Context, model: str, data: str) -> dict[str, Any]:
    """Of a trainer's process."""
    of = {"at_once": case["max_tokens"], **DEFAULTS, **SETTINGS[name]}
    if of["trainer"] == "trl":  # steps are whole numbers of forward passes
        of["at_once"] = min(of["at_once"], case["pairs_per_step"])
    return {
        **of,
        "model": model,
        "data": data,
        "max_tokens": case["max_tokens"],
        "pairs_per_step": case["pairs_per_step"],
        "lora_rank": 16 if case["mode"] == "lora" else 0,
        "checkpointing": case.get("checkpointing", False),
        "dtype": case["dtype"],
        "bf16": True,
        "learning_rate": LEARNING_RATE,
        "repeat": False,
        "steps": 1 + context.rounds_of(case),
        "threads": context.threads,
        "seed": 0,
    }


def measure(workload: Workload, cases: list[Case], context: Context, red: str = "") -> None:
    """Hands the rows of every case to `context.keep`. red: tests that failed, so that ours is not measured."""
    context.device_name = context.device_name or device_name(context.device)
    if not cases:
        return
    if context.left() < RESERVE_SECONDS:
        for case in cases:
            context.keep(as_rows(workload, case, context, {p.name: NOT_RUN for p in context.providers(workload)}, {}))
        return
    verified = verify(workload, cases, context)
    for case in cases:
        # Real pairs, another model's size or other pairs to draw from are another case.
        count = max(case["pairs"], (1 + context.rounds_of(case)) * case["pairs_per_step"])
        case = case | {"pairs": count}
        if context.data:
            case |= {"model": Path(context.model).stem, "lengths": Path(context.data).stem, "pairs": "all"}
        answers = {p.name: dict(verified[p.name, (case["mode"],)]) for p in context.providers(workload)}
        for provider in context.providers(workload):
            if red and provider.role == "ours":
                answers[provider.name] = {"status": "wrong", "note": f"tests failed: {red}"}
        turns: dict[str, list[Answer]] = {}
        try:
            if context.left() > RESERVE_SECONDS:
                with inputs_of(case, context.model, context.data, count) as (model, data):
                    take_turns(case, context, answers, turns, model, data)
        except Exception as error:
            answers |= broken_off(error, answers, turns)
            raise
        finally:  # an interrupt keeps the rounds that are complete
            context.keep(as_rows(workload, case, context, answers, turns))


def device_name(device: str) -> str:
    if device == "cpu":
        return processor()
    import torch

    return torch.cuda.get_device_name()


def take_turns(
    case: Case, context: Context, answers: dict[str, Answer], turns: dict[str, list[Answer]], model: str, data: str
) -> None:
    """Fills in what trainers answer: for each that runs, its references of every step, then its steps.

    Where a case says "alone", trainers come one after another: they have the memory of a GPU for themselves.
    """
    names = [name for name, answer in answers.items() if answer["status"] == "ok"]
    settings = {name: settings_of(name, case, context, model, data) for name in names}
    for group in [[name] for name in names] if case.get("alone") else [names]:
        with ExitStack() as stack:
            processes = {name: stack.enter_context(trainer_process(context, TIMED)) for name in group}

            def load(name: str, processes: dict[str, tuple[Worker, str]] = processes) -> None:
                worker, folder = processes[name]
                answers[name] |= told(context.ask(worker, {**settings[name], "folder": folder}))

            context.side_by_side(load, group)
            running = [name for name in group if answers[name]["status"] == "ok"]
            turns |= {name: [] for name in running}
            for _ in range(2 * settings[group[0]]["steps"] if group else 0):
                for name in list(running):
                    if context.left() < RESERVE_SECONDS / 2:
                        return
                    turn = told(context.ask(processes[name][0], {}))
                    if turn["status"] == "ok":
                        turns[name].append(turn)
                    elif turn["status"] == NOT_RUN["status"]:
                        return
                    else:
                        answers[name] |= turn
                        del turns[name]
                        running.remove(name)


def as_rows(
    workload: Workload, case: Case, context: Context, answers: dict[str, Answer], turns: dict[str, list[Answer]]
) -> list[Row]:
    steps = 1 + context.rounds_of(case)
    done = {name: len(own) - steps for name, own in turns.items()}  # steps of each, the warm-up among them
    parts: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, own in turns.items():
        rounds = range(1, max(done[name], 0))
        parts[name] = {
            "reference_seconds": tuple(own[k]["seconds"] for k in rounds),
            "training_seconds": tuple(own[steps + k]["seconds"] for k in rounds),
            "seconds": tuple(own[k]["seconds"] + own[steps + k]["seconds"] for k in rounds),
        }
    seconds = {name: list(own["seconds"]) for name, own in parts.items() if own["seconds"]}
    rows: list[Row] = []
    for provider in context.providers(workload):
        answer, base = answers[provider.name], row_of(workload, provider, case, context)
        if provider.name not in seconds:
            status = NOT_RUN["status"] if answer["status"] == "ok" else answer["status"]
            note = answer.get("note", "") or NOT_RUN["note"]
            rows.append(replace(base, metric="seconds", unit="s", status=status, note=note))
        else:
            rows.append(replace(base, metric="seconds", unit="s", values=tuple(seconds[provider.name])))
            rows += ratio_rows(base, workload, seconds)
            part, own = parts[provider.name], turns[provider.name]
            first = own[0]["seconds"] + own[steps]["seconds"]
            rows.append(replace(base, metric="first_call_seconds", unit="s", values=(first,)))
            rows += [
                replace(base, metric=m, unit="s", values=part[m]) for m in ("reference_seconds", "training_seconds")
            ]
            last = own[-1]
            for metric, unit in (("peak_bytes", "B"), ("extra_bytes", "B"), ("tokens", "1")):
                if last.get(metric) is not None:
                    rows.append(replace(base, metric=metric, unit=unit, values=(float(last[metric]),)))
            if "loss" in last:
                losses = tuple(turn["loss"] for turn in own[steps:])
                rows.append(replace(base, metric="value", unit="1", values=losses, note="loss of each step"))
        for name, error in answer.get("errors", {}).items():
            rows.append(replace(base, metric=name, unit="1", values=(error,), note="relative, to float64"))
    return rows
