"""The benchmarks' worker, where ours has a wrong gradient."""

from __future__ import annotations

from benchmarks.suites.head.providers import WAYS, Way
from benchmarks.worker import main
from tests.benchmarks.faulty_worker import wrong_gradient

if __name__ == "__main__":
    WAYS["ours"] = Way(wrong_gradient)
    main()
