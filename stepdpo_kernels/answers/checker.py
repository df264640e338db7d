"""Comparing answers without trusting them: text first, and math-verify in processes that may hang or die."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stepdpo_kernels.answers.compare import compare
from stepdpo_kernels.answers.quick import clean
from stepdpo_kernels.types import StepDPOError

START_SECONDS = 120.0  # to import math-verify on a busy machine
SECONDS = 5.0


@dataclass(frozen=True)
class Verdict:
    """equal:   whether the answers are the same
    reason:  "equal", "different"; "no_answer": the prediction is empty; "unreadable": it is no mathematics;
             "unreadable_gold": the right answer itself is empty or no mathematics; "timeout", "crash": comparing took
             too long or too much memory
    """

    equal: bool
    reason: str


class AnswerChecker:
    """Compares many answers; to be closed, or used in a with statement.

    workers:  processes for what text alone does not decide; they start when they are first needed
    seconds:  that a comparison may take; the process is then replaced, and only that pair counts as "timeout"

    Not to be shared between threads. Raises StepDPOError where math-verify is needed and not there.
    """

    def __init__(self, workers: int = 1, seconds: float = SECONDS) -> None:
        if workers < 1:
            raise StepDPOError(f"workers must be at least 1, got {workers!r}")
        if not seconds > 0:
            raise StepDPOError(f"seconds must be above 0, got {seconds!r}")
        self.seconds = seconds
        self._workers: list[_Worker | None] = [None] * workers
        self._pid = os.getpid()

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None and self._pid == os.getpid():
                worker.end()
        self._workers = [None] * len(self._workers)

    def match(self, gold: str, prediction: str | None) -> Verdict:
        """One comparison."""
        return self.check([(gold, prediction)])[0]

    def check(self, pairs: Iterable[tuple[str, str | None]]) -> list[Verdict]:
        """Verdicts of (gold, prediction) in order."""
        pairs = list(pairs)
        verdicts: dict[int, Verdict] = {}
        asked: dict[tuple[str, str], list[int]] = {}
        for i, (gold, prediction) in enumerate(pairs):
            verdict = _quickly(gold, prediction)
            if verdict is None:
                assert prediction is not None
                asked.setdefault((gold, prediction), []).append(i)
            else:
                verdicts[i] = verdict
        if asked:
            for key, verdict in self._ask(deque(asked)).items():
                verdicts |= dict.fromkeys(asked[key], verdict)
        return [verdicts[i] for i in range(len(pairs))]

    def _ask(self, pairs: deque[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
        if self._pid != os.getpid():  # after a fork the pipes belong to the parent
            self._workers, self._pid = [None] * len(self._workers), os.getpid()
        verdicts: dict[tuple[str, str], Verdict] = {}
        with self._busy() as busy, selectors.DefaultSelector() as selector:
            while pairs or busy:
                for number in range(len(self._workers)):
                    if pairs and number not in busy:
                        worker = self._worker(number)
                        busy[number] = worker, pairs.popleft()
                        worker.send(busy[number][1], self.seconds)
                        selector.register(worker.output, selectors.EVENT_READ, number)
                wait = min(worker.deadline for worker, _ in busy.values()) - time.monotonic()
                ready = {key.data for key, _ in selector.select(max(wait, 0))}
                for number, (worker, pair) in list(busy.items()):
                    verdict = worker.verdict() if number in ready else None
                    if verdict is None and not worker.ended and time.monotonic() < worker.deadline:
                        continue
                    selector.unregister(worker.output)
                    del busy[number]
                    if verdict is None:
                        verdict = Verdict(False, "crash" if worker.ended else "timeout")
                        worker.end()
                        self._workers[number] = None
                    verdicts[pair] = verdict
        return verdicts

    @contextmanager
    def _busy(self) -> Iterator[dict[int, tuple[_Worker, tuple[str, str]]]]:
        """Workers and what they compare. Whoever is left in it was interrupted, and would answer the next question."""
        busy: dict[int, tuple[_Worker, tuple[str, str]]] = {}
        try:
            yield busy
        finally:
            for number, (worker, _) in busy.items():
                worker.end()
                self._workers[number] = None

    def _worker(self, number: int) -> _Worker:
        worker = self._workers[number]
        if worker is None or worker.process.poll() is not None:
            worker = self._workers[number] = _Worker(self.seconds)
        return worker


def _quickly(gold: str, prediction: str | None) -> Verdict | None:
    if not clean(gold):
        return Verdict(False, "unreadable_gold")
    if prediction is None or not clean(prediction):
        return Verdict(False, "no_answer")
    equal = compare(gold, prediction)
    return None if equal is None else Verdict(equal, "equal" if equal else "different")


class _Worker:
    """A process that compares, and the answer of it that is awaited. ended: it is no more."""

    def __init__(self, seconds: float) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise StepDPOError("comparing answers needs the package math-verify: pip install 'stepdpo-kernels[eval]'")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stepdpo_kernels.answers.worker", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.received, self.ended = b"", False
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            deadline = time.monotonic() + START_SECONDS
            while b"\n" not in self.received and not self.ended:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    break
                self._receive()
        if not self.received.startswith(b"ready"):
            self.end()
            raise StepDPOError(
                "the process that compares answers could not be started; does "
                "`python -m stepdpo_kernels.answers.worker 5` print ready?"
            )
        self.received = b""
        self.deadline = 0.0

    def _receive(self) -> None:
        data = os.read(self.output, 65536)
        self.received += data
        self.ended = not data

    def send(self, pair: tuple[str, str], seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        try:
            os.write(self.input, json.dumps(pair).encode() + b"\n")
        except BrokenPipeError:
            self.ended = True

    def verdict(self) -> Verdict | None:
        """To be called when there is something to read: None where that is not the whole answer."""
        self._receive()
        line, end, self.received = self.received.partition(b"\n")
        if not end:
            self.received = line
            return None
        return Verdict(**json.loads(line))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


_shared: AnswerChecker | None = None


def answers_match(gold: str, prediction: str) -> bool:
    """Whether a prediction is the right answer, as README.md in this folder tells.

    What text alone does not decide is compared by math-verify in a process of its own, which is kept for the next
    call; a comparison that takes longer than 5 seconds is no match. For many answers use `AnswerChecker`.
    """
    global _shared
    if _shared is None:
        _shared = AnswerChecker()
        atexit.register(_shared.close)
    return _shared.match(gold, prediction).equal
