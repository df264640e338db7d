"""`stepdpo`: the commands, and how their errors are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from stepdpo_kernels import __version__
from stepdpo_kernels.cli import prepare
from stepdpo_kernels.cli.evaluate import evaluate
from stepdpo_kernels.cli.inspect import inspect

BAD_INPUT = 2  # exit status, as for a bad option
DEBUG = "STEPDPO_DEBUG"

app = typer.Typer(
    name="stepdpo",
    help="Step-DPO training: exact, with every shared prefix encoded once and no logits in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(evaluate)
app.command()(inspect)
app.add_typer(prepare.app, name="prepare")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(context: typer.Context) -> None:
    """Train a model on step pairs; `stepdpo train --help` lists every option."""
    from stepdpo_kernels.cli.train import train

    train(context)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepdpo-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error; {DEBUG}=1 does the same.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line, `sys.argv` by default, and exits.

    Exit status: 0, 2 for bad options or bad input (one message on stderr and, unless it is asked for, no traceback),
    130 when interrupted.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="stepdpo")
    except ModuleNotFoundError as error:
        if _debug() or error.name is None or error.name.startswith("stepdpo_kernels"):
            raise
        _fail(f"the package {error.name} is needed: pip install 'stepdpo-kernels[train]'")
    except (ValueError, OSError) as error:  # StepDPOError is a ValueError
        if _debug():
            raise
        _fail(str(error) or type(error).__name__)
    sys.exit(0)


def _debug() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    sys.exit(BAD_INPUT)
