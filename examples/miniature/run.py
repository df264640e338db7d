"""The stages in order, with their progress and times."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.miniature import curves, evaluate, pairs, report, sft, sharing
from examples.miniature import progress as progress_
from examples.miniature.settings import Settings
from examples.miniature.train import mean_logps, train
from stepdpo_kernels import StepDPOError, load_step_pairs

OWN, HELD_OUT, FOREIGN = "pairs.jsonl", "pairs-held-out.jsonl", "pairs-random-numbers.jsonl"
SFT_MODEL, OWN_MODEL, FOREIGN_MODEL = "model-sft", "model-step-dpo", "model-random-numbers"
REPORT, CURVES, SETTINGS, REFERENCE = "report.md", "curves.png", "settings.json", "reference"


class Stages:
    """Shows one bar for the stage at work and a line for each that is done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.done: list[report.Stage] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[progress_.Progress]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
        )
        start, cpu = time.perf_counter(), time.process_time()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=None, words="")

            def show(done: int, total: int, words: str) -> None:
                bars.update(task, completed=done, total=total, words=words)

            yield show
        stage = report.Stage(name, time.perf_counter() - start, time.process_time() - cpu)
        self.done.append(stage)
        self.console.print(f"[green]done[/] {name} [dim]{stage.seconds:.1f} s[/]", highlight=False)


def run(output: Path, settings: Settings, *, fresh: bool = False, console: Console | None = None) -> report.Results:
    """Runs the demonstration and writes its files into `output`; what an earlier run left there is replaced.

    Raises StepDPOError when `output` holds anything else, and when the samples gave too few pairs to train on.
    """
    console = console or Console()
    stage = Stages(console)
    if output.exists() and any(output.iterdir()) and not (output / SETTINGS).is_file():
        raise StepDPOError(f"output {str(output)!r} holds something else than this demonstration: name another folder")
    output.mkdir(parents=True, exist_ok=True)
    (output / SETTINGS).write_text(json.dumps(asdict(settings), indent=1) + "\n")
    for name in (OWN_MODEL, FOREIGN_MODEL, REFERENCE):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (OWN, HELD_OUT, FOREIGN, REPORT, CURVES):
        (output / name).unlink(missing_ok=True)

    with stage("fine-tune from scratch") as show:
        model, tokenizer, cached = sft.sft_model(output / SFT_MODEL, settings, fresh=fresh, progress=show)
    if cached:
        console.print(f"     [dim]taken from {output / SFT_MODEL}; --fresh trains it again[/]")
    torch.manual_seed(settings.seed)

    test = evaluate.draw("evaluate", settings.evaluation_problems, settings)
    among = evaluate.draw("curve", settings.curve_problems, settings)
    with stage("accuracy before") as show:
        before = evaluate.measure(model, tokenizer, test, settings, show)

    with stage("collect, locate and rectify mistakes") as show:
        records, wrong, located = pairs.prepare(model, tokenizer, output, settings, show)
    prompts = _write_pairs(output, records, wrong, settings)
    sets = {
        "fine-tuning": {problem.prompt for problem in sft.sft_problems(settings)},
        "pairs": prompts,
        "curves": {problem.prompt for problem in among},
        "evaluation": {problem.prompt for problem in test},
    }

    datasets = {name: load_step_pairs(output / name, tokenizer, template="none") for name in (OWN, HELD_OUT, FOREIGN)}
    chosen, rejected = mean_logps(model, datasets[OWN], settings)
    _, random_rejected = mean_logps(model, datasets[FOREIGN], settings)

    trainings, after = [], []
    for words, name, folder in (("own mistakes", OWN, OWN_MODEL), ("random numbers", FOREIGN, FOREIGN_MODEL)):
        with stage(f"Step-DPO on {words}") as show:
            training = train(
                output / SFT_MODEL,
                output / folder,
                output / REFERENCE,
                datasets[name],
                datasets[HELD_OUT],
                among,
                settings,
                show,
            )
        with stage(f"accuracy after, {words}") as show:
            after.append(evaluate.measure(training.model, tokenizer, test, settings, show))
        trainings.append(training)

    with stage("what sharing saves") as show:
        packing = sharing.compare(output / SFT_MODEL, datasets[OWN], settings, show)

    results = report.Results(
        settings=settings,
        cached=cached,
        wrong=wrong,
        located=located,
        pairs=len(datasets[OWN]),
        held_out=len(datasets[HELD_OUT]),
        logps=(chosen, rejected, random_rejected),
        first_loss=trainings[0].curves["loss"][0][1],
        before=before,
        own=after[0],
        foreign=after[1],
        training_seconds=(trainings[0].seconds, trainings[1].seconds),
        shared_problems=evaluate.shared_problems(sets),
        packing=packing,
        stages=tuple(stage.done),
    )
    curves.draw(output / CURVES, trainings[0].curves, trainings[1].curves, settings.curve_problems)
    report.write(output / REPORT, results)
    _summarise(console, results, output)
    return results


def _write_pairs(output: Path, records: list[pairs.Record], wrong: int, settings: Settings) -> set[str]:
    """Writes the three files of pairs, has the checker confirm each from what was written, and returns the prompts."""
    if len({record["prompt"] for record in records}) < 2:
        raise StepDPOError(
            f"{wrong} wrong solutions gave {len(records)} pairs: too few to train on and hold out; "
            "raise collect_problems, continuations or sft_steps in settings.py"
        )
    own, held_out = pairs.hold_out(records)
    foreign = pairs.out_of_distribution(own, settings.seed)
    prompts: set[str] = set()
    for name, some in ((OWN, own), (HELD_OUT, held_out), (FOREIGN, foreign)):
        pairs.write(output / name, some)
        prompts |= {record["prompt"] for record in pairs.read_verified(output / name, settings.chain)}
    return prompts


def _summarise(console: Console, results: report.Results, output: Path) -> None:
    table = Table(title=f"{len(results.before.right):,} fresh problems, greedy")
    for column in report.HEADER:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in report.accuracy_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(results.verdict, highlight=False)
    console.print(report.sharing_sentence(results), highlight=False)
    total = sum(stage.seconds for stage in results.stages)
    console.print(f"{total:.0f} s in all. Read {output / REPORT}, look at {output / CURVES}.", highlight=False)
