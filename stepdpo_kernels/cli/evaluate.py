"""`stepdpo evaluate`: how often a model's final answers are right, and whether that is more than another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepdpo_kernels._bars import open_bar
from stepdpo_kernels._errors import StepDPOError
from stepdpo_kernels.cli.options import GeneratorOptions, OnBad, spread

if TYPE_CHECKING:
    from rich.console import Console

    from stepdpo_kernels.data.pipeline.stage import StageReport
    from stepdpo_kernels.evaluation.report import Results
    from stepdpo_kernels.evaluation.tasks import Task

SECONDS = 10.0  # for a comparison of two answers


@dataclass(frozen=True)
class ModelOptions(GeneratorOptions):
    """What generates text; nothing where a run that is there is shown or compared."""

    model: Annotated[
        str,
        typer.Option(
            help="Folder, GGUF file or hub id; with a server, the name it serves. Without it, the run in --output-dir "
            "is shown."
        ),
    ] = ""


@dataclass(frozen=True)
class ProblemOptions:
    """What is asked."""

    task: Annotated[
        str | None, typer.Option(help="gsm8k, math, math500, aime2024 or odyssey-math; a title only, with --data.")
    ] = None
    data: Annotated[
        str | None, typer.Option(help="Problems with answers in place of the task's: JSONL, JSON, Parquet, a hub id.")
    ] = None
    format: Annotated[
        str | None, typer.Option(help="Of --data: gsm8k, math, aqua, aime, odyssey or plain; default: seen.")
    ] = None
    split: Annotated[str | None, typer.Option(help="Of a hub dataset or a folder; default: the task's.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many problems.")] = None
    instruction: Annotated[
        str, typer.Option(help="Follows every problem on a line of its own; the prompt is that of training without it.")
    ] = ""
    beginning: Annotated[str | None, typer.Option(help="How every solution begins; \\n is a new line.")] = None

    def build(self) -> Task:
        from stepdpo_kernels.evaluation.tasks import find_task

        task = replace(find_task(self.task, self.data, self.split), instruction=self.instruction)
        if self.format is not None:
            task = replace(task, format=self.format)
        if self.beginning is not None:
            task = replace(task, beginning=self.beginning.replace("\\n", "\n"))
        return task


@dataclass(frozen=True)
class DrawOptions:
    """How solutions are drawn."""

    n: Annotated[int, typer.Option(min=1, help="Solutions of each problem, for pass@k and the majority's answer.")] = 1
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 for all tokens.")] = 0.95
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a solution; default: the task's.")] = None
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0


@spread
def evaluate(
    output_dir: Annotated[
        Path, typer.Option(help="Folder of the run: every item, numbers, reports; a stopped run goes on from there.")
    ],
    model: ModelOptions,
    problems: ProblemOptions,
    draw: DrawOptions,
    compare: Annotated[
        Path | None, typer.Option(help="Folder of another finished run on the same items, to compare with.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compare answers.")] = 1,
    chunk: Annotated[int, typer.Option(min=1, help="Problems done together; a stopped run loses at most these.")] = 64,
    on_bad: Annotated[
        OnBad,
        typer.Option(help="A record that cannot be read: stop, or skip it; a sample that fails: stop, or not right."),
    ] = OnBad.STOP,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again, whatever is there.")] = False,
) -> None:
    """Measure a model's accuracy on GSM8K, MATH, AIME or problems of your own, and compare two models."""
    from stepdpo_kernels.evaluation.report import read_results, write_report

    other = None if compare is None else read_results(compare)
    if model.model:
        _run(output_dir, model, problems, draw, workers=workers, chunk=chunk, on_bad=on_bad, overwrite=overwrite)
    elif problems != ProblemOptions() or draw != DrawOptions() or overwrite:
        raise StepDPOError("nothing is asked without --model; a run that is there is shown with --output-dir alone")
    results = read_results(output_dir)
    files = write_report(results, other)
    _tell(results, other, files)


def _run(
    output_dir: Path,
    model: ModelOptions,
    problems: ProblemOptions,
    draw: DrawOptions,
    *,
    workers: int,
    chunk: int,
    on_bad: OnBad,
    overwrite: bool,
) -> None:
    from stepdpo_kernels.answers import AnswerChecker
    from stepdpo_kernels.data.generation import Sampling
    from stepdpo_kernels.evaluation.run import evaluate

    task = problems.build()
    sampling = Sampling(
        n=draw.n,
        temperature=draw.temperature,
        top_p=draw.top_p,
        max_new_tokens=draw.max_new_tokens or task.max_new_tokens,
        seed=draw.seed,
    )
    settings = {
        "data": problems.data,
        "split": task.split,
        "template": model.template,
        "tokenizer": model.tokenizer,
        "dtype": model.dtype,
        "weights": _weights(model.model),
    }
    counts = [count for count in (task.items, problems.limit) if count is not None]
    total = min(counts) if task.items is not None else None
    with AnswerChecker(workers=workers, seconds=SECONDS) as checker, open_bar(total, "evaluate: ", unit="items") as bar:

        def show(report: StageReport) -> None:
            bar.set_postfix_str(_share_right(report), refresh=False)
            bar.update(report.read - bar.n)

        evaluate(
            task,
            output_dir,
            model.build(),
            checker,
            sampling,
            settings=settings,
            limit=problems.limit,
            chunk=chunk,
            on_bad=on_bad.value,
            overwrite=overwrite,
            progress=show,
        )


def _weights(model: str) -> str | None:
    """When a local model's weights were written: a run that is there is not that of a model trained anew since."""
    path = Path(model).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    files = [file for file in files if file.suffix in (".safetensors", ".bin", ".gguf")]
    if not files:
        return None
    newest = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC)
    return f"{sum(file.stat().st_size for file in files):,} bytes, written {newest:%Y-%m-%d %H:%M:%S} UTC"


def _share_right(report: StageReport) -> str:
    from stepdpo_kernels.evaluation.run import VERDICTS

    total = sum(report.counts.get(verdict.replace("_", " "), 0) for verdict in VERDICTS)
    return f"{report.counts.get('right', 0) / total:.1%} right" if total else ""


# ---- what is printed ------------------------------------------------------------------------------------------------


def _tell(results: Results, other: Results | None, files: Sequence[Path]) -> None:
    from rich.console import Console

    from stepdpo_kernels.evaluation import report as words
    from stepdpo_kernels.evaluation.compare import compare

    console = Console(highlight=False, markup=False, soft_wrap=True)
    summary, settings = results.summary, results.settings
    console.print(f"{settings['title']}: {settings['generator']}, {summary.items:,} items", style="bold")
    rows = [
        (name, words.percent(found.value), words.points(found.standard_error), words.interval(found))
        for name, found in words.score_rows(summary)
    ]
    _table(console, ("", "value", "standard error", "95% interval"), rows)
    shares = [("unfinished", summary.unfinished), ("without an answer", summary.no_answer), ("failed", summary.failed)]
    for name, share in shares:
        if share:
            console.print(f"  {words.percent(share)} of the samples {name}, counted as not right", style="yellow")
    for reason, count in settings["skipped"].items():
        console.print(f"  {count:,} records left out: {reason}", style="yellow")
    for rows_ in (summary.subjects, summary.levels):
        if rows_:
            table = words.table_of(rows_)
            _table(console, table.header, table.rows)
    if other is not None:
        names = words.names_of(results, other)
        console.print(words.verdict_words(compare(results.scores, other.scores), *names), style="bold")
    console.print("written to " + ", ".join(str(file) for file in files))


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    table: Any = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    table.add_column(header[0], no_wrap=True)
    for column in header[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
