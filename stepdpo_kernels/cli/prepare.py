"""`stepdpo prepare`: a problem set and a model -> the model's own mistakes as step pairs, in three stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepdpo_kernels._bars import open_bar
from stepdpo_kernels._errors import StepDPOError
from stepdpo_kernels.cli.options import (
    ConversionOptions,
    GeneratorOptions,
    LaterStageOptions,
    SamplingOptions,
    StageOptions,
    StepOptions,
    spread,
)

if TYPE_CHECKING:
    from stepdpo_kernels.data.pipeline.grading import Checker
    from stepdpo_kernels.data.pipeline.locate.protocol import Locator, Verifier
    from stepdpo_kernels.data.pipeline.stage import StageReport

app = typer.Typer(
    help="Make step pairs out of a model's own mistakes: collect, locate, rectify; import and export pairs.",
    no_args_is_help=True,
)

MICROS = "cost_micros"  # as a judge counts it
SECONDS = 10.0  # for a comparison of two answers


class Keep(StrEnum):
    WRONG = "wrong"
    ALL = "all"


class LocatorName(StrEnum):
    EXACT = "exact"
    ROLLOUT = "rollout"
    JUDGE = "judge"
    HUMAN = "human"


class VerifierName(StrEnum):
    EXACT = "exact"
    JUDGE = "judge"


class ImportFormat(StrEnum):
    PRM800K = "prm800k"
    STEP_DPO = "step-dpo"
    PREFERENCE = "preference"


class ExportFormat(StrEnum):
    TRL = "trl"
    TRL_TEXT = "trl-text"
    LLAMA_FACTORY = "llama-factory"


class Search(StrEnum):
    BINARY = "binary"
    LINEAR = "linear"


Output = Annotated[Path, typer.Option(help="JSON lines; beside it lies a run file that a killed stage goes on from.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that compare answers.")]


@dataclass(frozen=True)
class OptionalGenerator(GeneratorOptions):
    """What goes on with solutions, for rollouts alone."""

    model: Annotated[str, typer.Option(help="rollout: the model that wrote the solutions.")] = ""


@dataclass(frozen=True)
class LocatorOptions:
    """How a locator works."""

    modulus: Annotated[int | None, typer.Option(help="exact: equations hold modulo this number.")] = None
    strict: Annotated[
        bool, typer.Option("--strict", help="exact: a step without an equation leaves later ones undecided.")
    ] = False
    checker: Annotated[
        str | None, typer.Option(help="exact: a function module:name that decides instead of the arithmetic.")
    ] = None
    judge_model: Annotated[str | None, typer.Option(help="judge: name of the model at its server.")] = None
    judge_url: Annotated[str | None, typer.Option(help="judge: address of its server, of the OpenAI protocol.")] = None
    judge_key_env: Annotated[str, typer.Option(help="judge: environment variable with its server's key.")] = (
        "OPENAI_API_KEY"
    )
    judge_concurrency: Annotated[int, typer.Option(min=1, help="judge: requests at a time.")] = 16
    prompt_file: Annotated[Path | None, typer.Option(help="judge: a prompt of your own; see docs/prepare.md.")] = None
    price_in: Annotated[float, typer.Option(min=0, help="judge: price of a million prompt tokens.")] = 0.0
    price_out: Annotated[float, typer.Option(min=0, help="judge: price of a million completion tokens.")] = 0.0
    rollouts: Annotated[int, typer.Option(min=1, help="rollout: continuations after a step, at most.")] = 8
    search: Annotated[Search, typer.Option(help="rollout: order in which steps are tried.")] = Search.BINARY
    review: Annotated[Path | None, typer.Option(help="human: the review file, filled in.")] = None

    def exact(self) -> Verifier:
        from stepdpo_kernels.data.pipeline.locate.exact import ExactLocator

        return ExactLocator(modulus=self.modulus, strict=self.strict, checker=self.checker)

    def judge(self) -> Verifier:
        from stepdpo_kernels.data.generation.openai_client import OpenAIClient
        from stepdpo_kernels.data.pipeline.locate.judge import JudgeLocator

        if self.judge_url is None or self.judge_model is None:
            raise StepDPOError("a judge needs --judge-url and --judge-model")
        client = OpenAIClient(
            self.judge_url, self.judge_model, key_variable=self.judge_key_env, concurrency=self.judge_concurrency
        )
        return JudgeLocator(client, prompt_file=self.prompt_file, price_in=self.price_in, price_out=self.price_out)

    def human(self) -> Locator:
        from stepdpo_kernels.data.pipeline.locate.human import HumanLocator

        if self.review is None:
            raise StepDPOError("a human locator needs --review: the file that stepdpo prepare review wrote, filled in")
        return HumanLocator(self.review)

    def build(
        self, name: LocatorName, generator: OptionalGenerator, sampling: SamplingOptions, checker: Checker
    ) -> Locator:
        if name is not LocatorName.ROLLOUT:
            built: Locator = getattr(self, name.value)()
            return built
        from stepdpo_kernels.data.pipeline.locate.rollout import RolloutLocator

        if not generator.model:
            raise StepDPOError("rollouts need --model: the model that wrote the solutions")
        return RolloutLocator(generator.build(), checker, sampling.build(self.rollouts), search=self.search.value)


@contextmanager
def _progress(words: str, total: int | None) -> Iterator[Callable[[StageReport], None]]:
    with open_bar(total, f"{words}: ", unit="records") as bar:

        def show(report: StageReport) -> None:
            bar.update(report.read - bar.n)
            bar.set_postfix_str(f"{report.written:,} written")

        try:
            yield show
        except KeyboardInterrupt:
            bar.close()
            typer.echo(f"{words} was interrupted; the same command goes on from the last whole chunk", err=True)
            raise


def _total(path: str, limit: int | None) -> int | None:
    """How many records a file of JSON lines has; None for anything else."""
    if not path.endswith(".jsonl") or not Path(path).expanduser().is_file():
        return limit
    with Path(path).expanduser().open("rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        lines = sum(block.count(b"\n") for block in blocks)
    return lines if limit is None else min(lines, limit)


def _check_places(source: str, output: Path, split: str = "train", *, partial: bool = True) -> None:
    """Before a model is loaded: that there is something to read, and a folder to write to."""
    from stepdpo_kernels.data.pipeline.stage import check_complete, stage_input

    stage_input(source, output, split)  # what is no path is asked of the hub later
    if not partial:
        check_complete(source)
    if not output.parent.is_dir():
        raise StepDPOError(f"output {str(output)!r}: there is no folder {str(output.parent)!r}")


def _tell(report: StageReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{report.read:,}", "records read" + (f", {report.resumed:,} of them before" * bool(report.resumed)))
    for name, count in sorted(report.counts.items()):
        if name.startswith(MICROS):
            table.add_row(f"{count / 1e6:,.6f}", name.replace(MICROS, "cost"))
        else:
            table.add_row(f"{count:,}" if isinstance(count, int) else f"{count:,.4g}", name.replace("_", " "))
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
    split: Annotated[str, typer.Option(help="Split of a hub dataset or a folder.")] = "train",
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

    _check_places(problems, output, split)
    draw, cut = sampling.build(n, logps=not generator.continuous), step.build()
    total = _total(problems, stage.limit)
    with AnswerChecker(workers=workers, seconds=SECONDS) as checker, _progress("collect", total) as progress:
        report = collect(
            problems,
            output,
            generator.build(),
            checker,
            draw,
            split=split,
            format=format,
            beginning=beginning.replace("\\n", "\n"),
            steps=cut,
            keep=keep.value,
            progress=progress,
            **vars(stage),
        )
    _tell(report)


@app.command()
@spread
def locate(
    solutions: Annotated[str, typer.Argument(help="What collect wrote.")],
    output: Output,
    options: LocatorOptions,
    generator: OptionalGenerator,
    sampling: SamplingOptions,
    stage: LaterStageOptions,
    locator: Annotated[LocatorName, typer.Option(help="What finds the first wrong step.")] = LocatorName.EXACT,
    compare: Annotated[
        LocatorName | None, typer.Option(help="A second locator; how far the two agree is printed.")
    ] = None,
    workers: Workers = 1,
) -> None:
    """Find the first wrong step of each wrong solution."""
    from stepdpo_kernels.answers import AnswerChecker
    from stepdpo_kernels.data.pipeline.locate.stage import agreement_of, locate

    _check_places(solutions, output, partial=stage.partial)
    with (
        AnswerChecker(workers=workers, seconds=SECONDS) as checker,
        _progress("locate", _total(solutions, stage.limit)) as progress,
    ):
        first = options.build(locator, generator, sampling, checker)
        second = None if compare is None else options.build(compare, generator, sampling, checker)
        report = locate(
            solutions,
            output,
            first,
            compare=second,
            seed=sampling.seed,
            progress=progress,
            **vars(stage),
        )
    _tell(report)
    if compare is not None and report.written:
        typer.echo(f"\nAgreement of {locator} (a) and {compare} (b)\n{agreement_of(output)}")


@app.command()
def review(
    solutions: Annotated[str, typer.Argument(help="What collect wrote.")],
    output: Annotated[Path, typer.Option(help="The file to be filled in; Markdown.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many solutions.")] = None,
) -> None:
    """Write a file in which a person marks first wrong steps, for locate --locator human."""
    from stepdpo_kernels.data.pipeline.locate.human import write_review
    from stepdpo_kernels.data.pipeline.solution import read_solutions

    wrong = (solution for solution in read_solutions(solutions) if solution.verdict != "right")
    count = write_review(islice(wrong, limit), output)
    typer.echo(f"{count:,} solutions are in {output}: fill in each line that asks for the first wrong step")


@app.command()
@spread
def rectify(
    located: Annotated[str, typer.Argument(help="What locate wrote.")],
    output: Output,
    generator: GeneratorOptions,
    sampling: SamplingOptions,
    step: StepOptions,
    locator: LocatorOptions,
    stage: LaterStageOptions,
    n: Annotated[int, typer.Option(min=1, help="Continuations of each mistake.")] = 20,
    verify: Annotated[
        VerifierName | None, typer.Option(help="A chosen step must also be right by exact or by a judge.")
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

    _check_places(located, output, partial=stage.partial)
    draw, cut = sampling.build(n, logps=not generator.continuous), step.build()
    verifier = None if verify is None else locator.exact() if verify is VerifierName.EXACT else locator.judge()
    total = _total(located, stage.limit)
    with AnswerChecker(workers=workers, seconds=SECONDS) as checker, _progress("rectify", total) as progress:
        report = rectify(
            located,
            output,
            generator.build(),
            checker,
            draw,
            steps=cut,
            verifier=verifier,
            max_chosen=max_chosen,
            dataset=dataset,
            progress=progress,
            **vars(stage),
        )
    _tell(report)


@app.command("import")
@spread
def import_(
    source: Annotated[str, typer.Argument(help="Their data: JSONL, JSON, Parquet, a folder, or a hub id.")],
    output: Output,
    step: StepOptions,
    conversion: ConversionOptions,
    format: Annotated[ImportFormat, typer.Option(help="What it is.")],
    max_pairs: Annotated[int | None, typer.Option(min=1, help="prm800k: most pairs of a step.")] = None,
) -> None:
    """Make step pairs of PRM800K, of Math-Step-DPO-10K as it is, or of preferences between whole answers."""
    from stepdpo_kernels.data.importers import import_pairs

    _check_places(source, output, conversion.split)
    with _progress("import", _total(source, conversion.limit)) as progress:
        report = import_pairs(
            source,
            output,
            format.value,
            steps=step.build(),
            max_pairs=max_pairs,
            progress=progress,
            **vars(conversion),
        )
    _tell(report)


@app.command()
@spread
def export(
    pairs: Annotated[str, typer.Argument(help="Step pairs: JSONL, JSON, Parquet, a folder, or a hub id.")],
    output: Output,
    conversion: ConversionOptions,
    format: Annotated[ExportFormat, typer.Option(help="For what.")],
    template: Annotated[str, typer.Option(help="trl-text: alpaca, deepseek-math, qwen2-boxed or none.")] = "none",
) -> None:
    """Write step pairs for TRL or for LLaMA-Factory."""
    from stepdpo_kernels.data.exporters import export_pairs

    _check_places(pairs, output, conversion.split)
    with _progress("export", _total(pairs, conversion.limit)) as progress:
        report = export_pairs(
            pairs,
            output,
            format.value,
            template=template,
            progress=progress,
            **vars(conversion),
        )
    _tell(report)
