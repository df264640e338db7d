"""What the programs have in common that write step pairs for other trainers: their arguments, and the pairs."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from transformers import AutoTokenizer

from stepdpo_kernels import StepDPOError, StepPair, load_step_pairs


def arguments(description: str, output: str) -> argparse.ArgumentParser:
    """A parser of the arguments of `load`; `output` says what is written."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", help="step pairs: a file, a folder or a data set of the hub")
    parser.add_argument("--tokenizer", required=True, help="the model that will be trained")
    parser.add_argument("--output", required=True, help=output)
    parser.add_argument("--template", default="chat", help="how the prompt is written, as in load_step_pairs")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prefix and longer step")
    return parser


def load(options: argparse.Namespace) -> tuple[Any, list[StepPair]]:
    """The tokenizer and the pairs. Raises StepDPOError for a pair with a weight, which other trainers do not know."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what is left out
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    pairs = load_step_pairs(options.data, tokenizer, template=options.template, max_length=options.max_length)
    for pair in pairs:
        if pair.weight != 1.0:
            raise StepDPOError(
                f"pair {pair.id!r}: field 'weight' is {pair.weight:g}, and other trainers weigh all pairs alike: leave "
                "it out, or train with StepDPOTrainer"
            )
    return tokenizer, list(pairs)
