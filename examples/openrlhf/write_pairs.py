"""Step pairs -> JSON lines for OpenRLHF: the prompt with the chat template and the earlier steps, and the two steps.

    python examples/openrlhf/write_pairs.py pairs.jsonl --tokenizer Qwen/Qwen2-7B-Instruct --output step_pairs.jsonl

OpenRLHF puts prompt and step together as text and adds an EOS, which `--stepdpo.end_of_step drop` takes off again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from stepdpo_kernels import load_step_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes step pairs for OpenRLHF.")
    parser.add_argument("data", help="step pairs: a file, a folder or a data set of the hub")
    parser.add_argument("--tokenizer", required=True, help="the model that will be trained")
    parser.add_argument("--output", required=True, help="a file of JSON lines; --data.dataset")
    parser.add_argument("--template", default="chat", help="how the prompt is written, as in load_step_pairs")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prefix and longer step")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    pairs = load_step_pairs(options.data, tokenizer, template=options.template, max_length=options.max_length)
    with Path(options.output).open("w", encoding="utf-8") as file:
        for pair in pairs:
            fields = {"prompt": pair.prefix_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
            texts = {name: tokenizer.decode(ids.tolist()) for name, ids in fields.items()}
            file.write(json.dumps(texts, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
