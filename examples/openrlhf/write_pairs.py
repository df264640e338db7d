"""Step pairs -> JSON lines for OpenRLHF: the prompt with the chat template and the earlier steps, and the two steps.

    python -m examples.openrlhf.write_pairs pairs.jsonl --tokenizer Qwen/Qwen2-7B-Instruct --output step_pairs.jsonl

OpenRLHF puts prompt and step together as text and adds an EOS, which `--stepdpo.end_of_step drop` takes off again.
"""

from __future__ import annotations

import json
from pathlib import Path

from examples.step_pairs import arguments, load


def main() -> None:
    options = arguments("Writes step pairs for OpenRLHF.", "a file of JSON lines; --data.dataset").parse_args()
    tokenizer, pairs = load(options)
    with Path(options.output).open("w", encoding="utf-8") as file:
        for pair in pairs:
            fields = {"prompt": pair.prefix_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
            texts = {name: tokenizer.decode(ids.tolist()) for name, ids in fields.items()}
            file.write(json.dumps(texts, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
