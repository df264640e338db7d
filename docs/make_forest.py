"""Draws docs/forest.png with `stepdpo inspect`: four step pairs of one problem, made here.

python docs/make_forest.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

PROBLEM = "A baker fills 4 trays with 6 rolls each. She sells 9 and packs the rest in bags of 5. How many bags?"
STEPS = ("She bakes 4 x 6 = 24 rolls.", "24 - 9 = 15 rolls are left.", "They fill 15 / 5 = 3 bags.")
# (which step, the right step, the wrong one)
PAIRS = (
    (1, STEPS[0], "That is 4 + 6 = 10 rolls."),
    (2, STEPS[1], "She has 24 + 9 = 33 rolls."),
    (3, STEPS[2], "Each bag takes 15 - 5 = 10 rolls."),
    (3, "So 15 / 5 makes 3 bags.", "Each bag takes 15 - 5 = 10 rolls."),
)


def records() -> list[dict[str, str]]:
    made = []
    for step, chosen, rejected in PAIRS:
        earlier = "".join(f"Step {k}: {text}\n" for k, text in enumerate(STEPS[: step - 1], start=1))
        steps = {"initial_reason_steps": f"{earlier}Step {step}:", "chosen": f" {chosen}", "rejected": f" {rejected}"}
        made.append({"prompt": PROBLEM, **steps})
    return made


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of the words, numbers and signs in the records, each with the space before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    text = "\n".join(value for record in records() for value in record.values())
    words = sorted({word for word, _ in split.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "[unknown]"])}, "[unknown]"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)


def main() -> None:
    from stepdpo_kernels.cli import main as stepdpo

    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("forest.png")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder)
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records()))
        stepdpo(["inspect", str(data), "--tokenizer", str(folder), "--output", str(picture)])


if __name__ == "__main__":
    main()
