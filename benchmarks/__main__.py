"""`python -m benchmarks run --suite step|forest|head ...`: measure, print a table, keep the rows."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

SUITES = {
    "step": "training steps, ours beside TRL's",
    "forest": "forward and backward with prefixes shared by tree, by pair, and not at all",
    "head": "log-probs and preference loss from hidden states, ours beside the peers",
}


def main() -> None:
    # The suite first: each has options of its own, which --help shows.
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--suite", choices=list(SUITES), default="step")
    chosen = which.parse_known_args()[0].suite
    suite = import_module(f"benchmarks.{chosen}")

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure and write results", formatter_class=_Defaults)
    told = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    run.add_argument("--suite", choices=list(SUITES), default="step", help=f"{told}; its options are below")
    run.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for rows.csv and environment.json")
    run.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")
    suite.add_arguments(run)
    suite.run(parser.parse_args())


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults of options that have one and a help text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


if __name__ == "__main__":
    main()
