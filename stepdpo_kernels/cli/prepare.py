"""`stepdpo prepare`: a problem set and a model -> the model's own mistakes as step pairs, in three stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepdpo_kernels._bars import open_bar
from stepdpo_kernels.cli.options import GeneratorOptions, SamplingOptions, StageOptions, StepOptions, spread

if TYPE_CHECKING:
    from stepdpo_kernels.data.pipeline.stage import StageReport

app = typer.Typer(
    help="Make step pairs out of a model's own mistakes: collect, locate, rectify; import and export pairs.",
    no_args_is_help=True,
)

SECONDS = 10.0  # for a comparison of two answers


class Keep(StrEnum):
    WRONG = "wrong"
    ALL = "all"


class LocatorName(StrEnum):
    EXACT = "exact"
    ROLLOUT = "rollout"
    JUDGE = "judge"
    HUMAN = "human"


Output = Annotated[Path, typer.Option(help="JSON lines; beside it lies a run file that a killed stage goes on from.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that compare answers.")]


@contextmanager
def _progress(words: str, total: int | None) -> Iterator[Callable[[StageReport], None]]:
    with open_bar(total, f"{words}: ", unit="records") as bar:

        def show(report: StageReport) -> None:
            bar.update(report.read - bar.n)
            bar.set_postfix_str(f"{report.written:,} written")

        yield show


def _total(path: str, limit: int | None) -> int | None:
    """How many records a file of JSON lines has; None for anything else."""
    if not path.endswith(".jsonl") or not Path(path).expanduser().is_file():
        return limit
    with Path(path).expanduser().open("rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        lines = sum(block.count(b"\n") for block in blocks)
    return lines if limit is None else min(lines, limit)


def _tell(report: StageReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{report.read:,}", "records read" + (f", {report.resumed:,} of them before" * bool(report.resumed)))
    for name, count in sorted(report.counts.items()):
        table.add_row(f"{count:,}" if isinstance(count, int) else f"{count:,.4g}", name)
    for name, count in report.skipped.items():
        table.add_row(f"{count:,}", f"left out: {name}", style="yellow")
    table.add_row(f"{report.written:,}", f"written to {report.output} in {report.seconds:,.0f} s", style="bold")
    Console(highlight=False, markup=False, soft_wrap=True).print(table)


@app.command()
@spread
def collect(
    problems: Annotated[
        str, typer.Argument(help="Problems with answers: JSONL, JSON, Parquet, a folder, or a hub id (name:config).")
    ],
    output: Output,
    generator: GeneratorOptions,
    sampling: SamplingOptions,
    step: StepOptions,
    stage: StageOptions,
    n: Annotated[int, typer.Option(min=1, help="Solutions of each problem.")] = 4,
    format: Annotated[
        str | None, typer.Option(help="Of the problems: gsm8k, math, aqua, aime, odyssey or plain; default: seen.")
    ] = None,
    beginning: Annotated[
        str, typer.Option(help="How every solution begins; \\n is a new line.")
    ] = "Let's think step by step.\\nStep 1:",
    keep: Annotated[Keep, typer.Option(help="Which solutions are written.")] = Keep.WRONG,
    workers: Workers = 1,
) -> None:
    """Sample solutions of problems, grade their answers, and keep the wrong ones."""
    from stepdpo_kernels.answers import AnswerChecker
    from stepdpo_kernels.data.pipeline.collect import collect

    total = _total(problems, stage.limit)
    with AnswerChecker(workers=workers, seconds=SECONDS) as checker, _progress("collect", total) as progress:
        report = collect(
            problems,
            output,
            generator.build(),
            checker,
            sampling.build(n),
            split=stage.split,
            format=format,
            beginning=beginning.replace("\\n", "\n"),
            steps=step.build(),
            keep=keep.value,
            chunk=stage.chunk,
            limit=stage.limit,
            on_bad=stage.on_bad.value,
            overwrite=stage.overwrite,
            progress=progress,
        )
    _tell(report)


@app.command()
@spread
def rectify(
    located: Annotated[str, typer.Argument(help="What locate wrote.")],
    output: Output,
    generator: GeneratorOptions,
    sampling: SamplingOptions,
    step: StepOptions,
    stage: StageOptions,
    n: Annotated[int, typer.Option(min=1, help="Continuations of each mistake.")] = 20,
    verify: Annotated[
        LocatorName | None, typer.Option(help="A chosen step must also be right by this locator: exact or judge.")
    ] = None,
    max_chosen: Annotated[
        int | None, typer.Option(min=1, help="Most pairs of a mistake; default: one for every different right step.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="The records' field of that name.")] = "stepdpo",
    workers: Workers = 1,
) -> None:
    """Let the model go on from before each mistake, and make pairs of its right steps and the wrong one."""
    from stepdpo_kernels.answers import AnswerChecker
    from stepdpo_kernels.data.pipeline.rectify import rectify

    total = _total(located, stage.limit)
    with AnswerChecker(workers=workers, seconds=SECONDS) as checker, _progress("rectify", total) as progress:
        report = rectify(
            located,
            output,
            generator.build(),
            checker,
            sampling.build(n),
            steps=step.build(),
            max_chosen=max_chosen,
            dataset=dataset,
            chunk=stage.chunk,
            limit=stage.limit,
            on_bad=stage.on_bad.value,
            overwrite=stage.overwrite,
            partial=stage.partial,
            progress=progress,
        )
    _tell(report)
