"""`python -m benchmarks run --suite step ...`: measure, print a table, keep the rows."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import step
from benchmarks.workload import synthetic


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure and write results")
    run.add_argument("--suite", choices=["step"], default="step", help="step: training steps, ours beside TRL's")
    run.add_argument(
        "--model", help="folder, GGUF file or hub id of a causal language model; without it, random weights"
    )
    run.add_argument("--data", help="step pairs in the released schema (JSONL); goes with --model")
    run.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for rows.csv and environment.json")
    run.add_argument("--providers", nargs="+", choices=sorted(step.PROVIDERS), default=list(step.DEFAULT_PROVIDERS))
    run.add_argument("--pairs-per-step", type=int, default=8)
    run.add_argument("--steps", type=int, default=5, help="optimiser steps of each run; the first is warm-up")
    run.add_argument("--repeats", type=int, default=3, help="rounds over all providers, interleaved")
    run.add_argument("--max-tokens", type=int, default=2048, help="our token budget of a forward pass")
    run.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights in memory")
    run.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            arguments.model, arguments.data = synthetic(Path(folder))
        step.run(arguments)


if __name__ == "__main__":
    main()
