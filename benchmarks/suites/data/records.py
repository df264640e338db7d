"""Made-up records of the released schema, as long in tokens as real ones, and a tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from benchmarks.lengths import Lengths, draw_lengths

VOCABULARY = 4000
SPECIAL = ("<|eos|>", "<|user|>", "<|assistant|>")
TEMPLATE = "{% for m in messages %}<|user|>\n{{ m['content'] }}\n{% endfor %}{{ '<|assistant|>\n' }}"
LEAD = "Let's think step by step.\nStep 1:"
SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ke", "lo", "mi", "nu", "pa", "qui", "ro", "se", "tu", "ve")
WORDS = 6000  # the rank of a word says how often it comes, as in real text

Record = dict[str, str]


def write(folder: Path, pairs: int) -> None:
    """`tokenizer`, byte pairs trained on the words, and pairs.jsonl."""
    tokenizer = trained_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    with (folder / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in made_records(draw_lengths(pairs), tokenizer))


def lexicon() -> list[str]:
    draw = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < WORDS:
        found["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4)))] = None
    return list(found)


def some_words(seed: int) -> Iterator[str]:
    draw, words = random.Random(seed), lexicon()
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    while True:
        yield from draw.choices(words, cum_weights=weights, k=1000)


def trained_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = some_words(seed=1)
    core.train_from_iterator([LEAD + "".join(f" {next(words)}" for _ in range(100)) for _ in range(500)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def made_records(lengths: list[Lengths], tokenizer: Any) -> list[Record]:
    """Pairs of a problem lie along one solution, as the lengths say; a text ends with the word that makes it full.

    Every step begins with a space, so that no token lies across its beginning.
    """
    tokens_of = tokens_of_words(tokenizer)
    stream = some_words(seed=2)

    def words(tokens: int) -> str:
        found = []
        while tokens > 0:
            found.append(f" {next(stream)}")
            tokens -= tokens_of[found[-1]]
        return "".join(found)

    marker = len(tokenizer("\nStep 2:").input_ids)
    around = len(tokenizer(f"<|user|>\n\n<|assistant|>\n{LEAD}").input_ids) + marker
    records = []
    for problem, group in groupby(lengths, key=lambda of: of.problem):
        mine = list(group)
        room = mine[0].shortest - around
        prompt = words(room // 2).lstrip()
        solution = LEAD + words(room - room // 2) + "\nStep 2:"
        prefixes, reached = {0: solution}, 0
        for number, beyond in enumerate(sorted({of.beyond for of in mine} - {0}), start=3):
            solution += words(beyond - reached - marker) + f"\nStep {number}:"
            prefixes[beyond], reached = solution, beyond
        rights: dict[int, str] = {}  # pairs of one prefix have the same right step
        for of in mine:
            right = rights.setdefault(of.beyond, words(of.chosen))
            step = {"initial_reason_steps": prefixes[of.beyond], "chosen": right, "rejected": words(of.rejected)}
            records.append({"prompt": prompt, **step, "answer": str(problem)})
    return records


def tokens_of_words(tokenizer: Any) -> dict[str, int]:
    """Of each word with the space before it."""
    words = [f" {word}" for word in lexicon()]
    return {word: len(ids) for word, ids in zip(words, tokenizer(words).input_ids, strict=True)}
