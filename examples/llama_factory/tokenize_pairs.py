"""Step pairs -> a data set that LLaMA-Factory loads as it is (`tokenized_path`): no end of turn after a step.

    python examples/llama_factory/tokenize_pairs.py pairs.jsonl --tokenizer Qwen/Qwen2-7B-Instruct --output step_pairs

Pairs of one problem stand together, so that `disable_shuffling: true` puts them into one batch; the problems are in
random order. Pairs that are too long are left out and counted, none is cut short.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from stepdpo_kernels import StepPair, load_step_pairs


def in_problems(pairs: Iterable[StepPair], seed: int) -> list[StepPair]:
    """The pairs of each problem one after the other, problems in random order."""
    problems: dict[Any, list[StepPair]] = {}
    for number, pair in enumerate(pairs):
        problems.setdefault(pair.group or number, []).append(pair)
    order = list(problems.values())
    random.Random(seed).shuffle(order)
    return [pair for problem in order for pair in problem]


def rows(pairs: Iterable[StepPair]) -> Iterator[dict[str, Any]]:
    """What LLaMA-Factory makes of a pair: tokens, and labels that are -100 before the step."""
    for pair in pairs:
        row: dict[str, Any] = dict(images=None, videos=None, audios=None)
        prefix = pair.prefix_ids.tolist()
        for name, step in (("chosen", pair.chosen_ids.tolist()), ("rejected", pair.rejected_ids.tolist())):
            row[f"{name}_input_ids"] = prefix + step
            row[f"{name}_attention_mask"] = [1] * len(prefix + step)
            row[f"{name}_labels"] = [-100] * len(prefix) + step
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokenises step pairs for LLaMA-Factory.")
    parser.add_argument("data", help="step pairs: a file, a folder or a data set of the hub")
    parser.add_argument("--tokenizer", required=True, help="the model that will be trained")
    parser.add_argument("--output", required=True, help="a folder; tokenized_path in the YAML file")
    parser.add_argument("--template", default="chat", help="how the prompt is written, as in load_step_pairs")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prefix and longer step")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    pairs = load_step_pairs(options.data, tokenizer, template=options.template, max_length=options.max_length)
    train = Dataset.from_list(list(rows(in_problems(pairs, options.seed))))
    DatasetDict({"train": train}).save_to_disk(options.output)


if __name__ == "__main__":
    main()
