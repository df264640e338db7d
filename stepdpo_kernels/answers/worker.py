"""`python -m stepdpo_kernels.answers.worker SECONDS`: compares answers by math-verify, one pair a line.

Reads a JSON list [gold, prediction] a line and writes a JSON object {"equal": ..., "reason": ...} a line. It ends when
its input does, when a pair takes too long, and when it needs too much memory; whoever started it starts another one.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

from stepdpo_kernels.answers.compare import compare

MEMORY = 4 << 30  # bytes of address space


def main() -> None:
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> list[object]:
        return list(parse(f"${text}$", kinds, fallback_mode="no_fallback", parsing_timeout=None))

    reasons: list[str] = []

    def decide(gold: str, prediction: str) -> bool:
        wanted = read(gold)
        if not wanted:
            reasons.append("unreadable_gold")
            return False
        found = read(prediction)
        if not found:
            reasons.append("unreadable")
            return False
        return bool(verify(wanted, found, strict=True, timeout_seconds=None))

    print("ready", flush=True)
    for line in sys.stdin:
        gold, prediction = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # its default action ends the process
        reasons.clear()
        try:
            equal = bool(compare(gold, prediction, decide))
            reason = "equal" if equal else (reasons or ["different"])[0]
        except (MemoryError, RecursionError):
            equal, reason = False, "crash"
        except Exception:  # sympy's errors are of every kind
            equal, reason = False, "unreadable"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"equal": equal, "reason": reason}), flush=True)


if __name__ == "__main__":
    main()
