"""What `stepdpo train --dry_run` takes on many pairs: `python -m benchmarks.plan --model FOLDER`.

The pairs are made up: 1 to 7 a problem, 4 in the mean, beginning after 0 to 4 steps of one solution; in SmolLM2's
tokens and chat template most prefixes have 150 to 400 tokens and most steps 20 to 60.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.measure import PeakMemory, worker_environment

WORDS = """
each of the apples in box number row twice half more than that left over price total cost per week day hour then adds
gives buys sells reads walks keeps so we have to find how many there are if she he they share divide equally students
teachers books pages miles minutes dollars cents tickets marbles garden fence field distance speed time
""".split()  # noqa: SIM905


def write_pairs(path: Path, pairs: int, seed: int = 0) -> None:
    """Writes so many records of the released schema, one a line."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        words = draw.choices(WORDS, k=draw.randint(least, most))
        return " ".join(word if draw.random() < 0.85 else str(draw.randrange(2, 1000)) for word in words)

    written = 0
    with path.open("w") as file:
        while written < pairs:
            prompt, steps = text(70, 130), [f" {text(15, 38)}.\n" for _ in range(5)]
            for _ in range(min(draw.randint(1, 7), pairs - written)):
                done = draw.randrange(5)  # steps before the one in question
                before = "".join(f"Step {k + 1}:{step}" for k, step in enumerate(steps[:done]))
                record = {
                    "prompt": prompt,
                    "initial_reason_steps": f"Let's think step by step.\n{before}Step {done + 1}:",
                    "chosen": steps[done].rstrip(),
                    "rejected": f" {text(15, 38)}.",
                    "answer": str(written),
                }
                file.write(json.dumps(record) + "\n")
                written += 1


def measure(model: str, data: Path) -> dict[str, Any]:
    """Seconds of each part in this process (by the clock, of processors), the plan, and in bytes the peak of the
    resident set over that with model and tokenizer: in a process that has done nothing else.
    """
    from stepdpo_kernels import StepDPOConfig, StepDPOTrainer, load_step_pairs
    from stepdpo_kernels.trainer import load_model, load_tokenizer

    tokenizer, policy = load_tokenizer(model), load_model(model)
    peak, seconds, since = PeakMemory("cpu"), {}, (time.perf_counter(), time.process_time())

    def lap(name: str) -> None:
        nonlocal since
        now = time.perf_counter(), time.process_time()
        seconds[name], since = [round(b - a, 2) for a, b in zip(since, now, strict=True)], now

    pairs = load_step_pairs(data, tokenizer, max_length=None)
    lap("load")
    args = StepDPOConfig(output_dir=str(data.parent), num_train_epochs=1)
    trainer = StepDPOTrainer(policy, args, pairs, tokenizer)
    lap("trainer")
    plan = trainer.plan()
    lap("plan")
    lengths = {
        name: sorted(getattr(pair, f"{name}_ids").size for pair in pairs) for name in ("prefix", "chosen", "rejected")
    }
    return {
        "seconds": seconds,
        "extra_bytes": peak.extra_bytes(),
        "lengths": {name: [sizes[len(sizes) * n // 20] for n in (1, 10, 19)] for name, sizes in lengths.items()},
        "plan": {
            "pairs": plan.pairs,
            "steps": plan.steps,
            "batches": plan.epoch.batches,
            "tokens": plan.epoch.tokens,
            "unshared": plan.epoch.unshared,
            "rows": plan.epoch.rows,
        },
    }


def command(model: str, data: Path) -> dict[str, Any]:
    """The whole command in a process of its own: seconds, and the peak of its resident set in bytes."""
    words = ["train", "--model", model, "--data", str(data), "--output_dir", str(data.parent / "run"), "--dry_run"]
    code = "from stepdpo_kernels.cli import main; main()"
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *words], check=True, env=worker_environment(), stdout=subprocess.DEVNULL
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": [round(time.perf_counter() - began, 2), round(used.ru_utime + used.ru_stime, 2)],
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub id, with its tokenizer")
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--command", action="store_true", help="also time the whole command in another process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, options.pairs)
        found = measure(options.model, data)
        if options.command:
            found["command"] = command(options.model, data)
            found["environment"] = environment()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
