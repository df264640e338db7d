"""`python -m benchmarks COMMAND`: is it exact, is it faster, does it need less memory?"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.registry import SIZES, SUITES

TUNED = ("head-chunked", "head-fused", "head-loss", "attention-forward", "attention-dq", "attention-dk")


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # what there is is written, as after Ctrl-C
    options.command(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, command, told in (
        ("run", run, "verify, measure, and write rows, plots and a report"),
        ("verify", verify, "hold every provider against float64, and run the tests that figures depend on"),
    ):
        add = commands.add_parser(name, help=told, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add.set_defaults(command=command)
        suites = "; ".join(f"{suite}: {what}" for suite, what in SUITES.items())
        add.add_argument("--suite", choices=[*SUITES, "all"], default="all", help=suites)
        add.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
        size = add.add_mutually_exclusive_group()
        size.add_argument("--quick", dest="size", action="store_const", const="quick", help="fewer cases and rounds")
        size.add_argument("--size", choices=SIZES, help="tiny: every path in seconds, no figure worth keeping")
        add.add_argument("--workloads", nargs="+", metavar="NAME", help="only these")
        add.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and the floors")
        add.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")
        add.add_argument("--timeout", type=float, default=600, help="seconds that one turn of a provider may take")
        add.add_argument("--dry", action="store_true", help="no GPU needed: Triton's kernels in its interpreter")
        add.add_argument("--no-tests", dest="tests", action="store_false", help="without the tests")
        if name == "run":
            add.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of results")
            add.add_argument("--rounds", type=int, help="over all providers; by default it depends on size and case")
            add.add_argument("--time-limit", type=float, help="seconds; what is not measured by then says so")
            add.add_argument("--model", help="real weights for training steps: a folder or GGUF file; goes with --data")
            add.add_argument("--data", help="step pairs in the released schema (JSONL); goes with --model")
    gpu = commands.add_parser("gpu", help="the tests marked gpu, then the suites, within a time limit")
    gpu.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of results")
    gpu.add_argument("--time-limit", type=float, default=510, help="seconds")
    gpu.add_argument(
        "--dry", action="store_true", help="without a GPU: tiny cases on the CPU, to see that all of it runs"
    )
    gpu.set_defaults(command=run_gpu)
    tune = commands.add_parser("tune", help="candidates for the tiles of our Triton kernels, one against the other")
    tune.add_argument("kernels", nargs="+", metavar="KERNEL", choices=TUNED, help=f"of {', '.join(TUNED)}")
    tune.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: Triton's interpreter, tiny sizes")
    tune.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    tune.add_argument("--rounds", type=int, default=7, help="over all candidates")
    tune.add_argument("--candidates", type=int, help="at most so many, the one in use among them")
    tune.add_argument("--time-limit", type=float, default=240, help="seconds for each kernel")
    tune.set_defaults(command=run_tune)
    busy = commands.add_parser("busy", help="how much of a training step a GPU computes, and what it waits for")
    busy.add_argument(
        "--model", default="Qwen2-1.5B", help="a size of benchmarks/suites/step/models.py, random weights"
    )
    busy.add_argument("--mode", choices=["full", "lora"], default="full", help="lora with gradient checkpointing")
    busy.add_argument("--pairs-per-step", type=int, default=128, metavar="PAIRS")
    busy.add_argument("--max-tokens", type=int, default=16_384, help="of a forward pass")
    busy.add_argument("--workers", type=int, default=0, help="processes that pack the next steps")
    busy.add_argument("--trace", type=Path, metavar="FILE", help="keep the profiler's trace (JSON) there")
    busy.set_defaults(command=run_busy)
    plot = commands.add_parser("plot", help="plots and report of a folder of results, from its CSV files alone")
    plot.add_argument("results", type=Path)
    plot.add_argument("--picture", type=Path, metavar="FILE", help="the README's picture, to FILE (SVG), and no more")
    plot.set_defaults(command=plot_results)
    compare = commands.add_parser("compare", help="do two folders of results agree? Status 1 where B is slower")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    compare.add_argument("--all", action="store_true", help="print every comparison")
    compare.set_defaults(command=compare_results)
    return parser


def run(options: argparse.Namespace) -> None:
    from benchmarks import session

    if (options.model is None) != (options.data is None):
        raise SystemExit("--model and --data go together")
    chosen = session.chosen(options.suite, options.workloads)
    limit = time.monotonic() + options.time_limit if options.time_limit else float("inf")
    size = options.size or "full"
    context = session.context(options, session.ROUNDS[size], limit)
    with_report(lambda: session.run(chosen, size, context, options.output, options.tests), options.output)


def run_gpu(options: argparse.Namespace) -> None:
    from benchmarks import gpu

    with_report(lambda: gpu.run(options), options.output)


def run_tune(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks import tune

    for kernel in options.kernels:
        end = time.monotonic() + options.time_limit

        def left(end: float = end) -> float:
            return end - time.monotonic()

        tune.tune(kernel, options.device, options.dtype, options.rounds, options.candidates, left)


def run_busy(options: argparse.Namespace) -> None:
    from benchmarks import busy

    busy.run(options)


def with_report(measure: Callable[[], list[str]], output: Path) -> None:
    """Measures, and writes the report of what there is, interrupted or not; `measure` returns what failed."""
    from benchmarks import report, rows

    failed = []
    try:
        failed = measure()
    except KeyboardInterrupt:
        print("interrupted: the report is of what there is", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if list(output.glob(f"*{rows.SUFFIX}")):
            print(f"report: {report.write_report(output)}")
    if failed:
        raise SystemExit("; ".join(failed))


def verify(options: argparse.Namespace) -> None:
    from benchmarks import session

    size = options.size or "full"
    if not session.verify(session.chosen(options.suite, options.workloads), size, options):
        raise SystemExit(1)


def plot_results(options: argparse.Namespace) -> None:
    if options.picture:
        from benchmarks import plots

        plots.picture(options.results, options.picture)
    else:
        from benchmarks import report

        print(f"report: {report.write_report(options.results)}")


def compare_results(options: argparse.Namespace) -> None:
    from benchmarks.compare import compare

    if not compare(options.a, options.b, show_all=options.all):
        raise SystemExit(1)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
