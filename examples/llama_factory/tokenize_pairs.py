"""Step pairs -> a data set that LLaMA-Factory loads as it is (`tokenized_path`): no end of turn after a step.

    python -m examples.llama_factory.tokenize_pairs pairs.jsonl --tokenizer Qwen/Qwen2-7B-Instruct --output step_pairs

Pairs of one problem stand together, so that `disable_shuffling: true` puts them into one batch; the problems are in
random order. Pairs that are too long are left out and counted, none is cut short.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, DatasetDict

from examples.step_pairs import arguments, load
from stepdpo_kernels import StepPair


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
    parser = arguments("Tokenises step pairs for LLaMA-Factory.", "a folder; tokenized_path in the YAML file")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    _, pairs = load(options)
    train = Dataset.from_list(list(rows(in_problems(pairs, options.seed))))
    DatasetDict({"train": train}).save_to_disk(options.output)


if __name__ == "__main__":
    main()
