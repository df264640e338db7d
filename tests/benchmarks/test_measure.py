"""What the suites measure with."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.measure import PeakMemory, Worker, available_bytes

LINUX = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")


@LINUX
def test_peak_memory_counts_what_was_released_again() -> None:
    memory = PeakMemory("cpu")
    torch.ones(64 * 2**20, dtype=torch.uint8)
    extra = memory.extra_bytes()
    assert extra is not None
    assert 60 * 2**20 < extra < 90 * 2**20

    def in_small_blocks() -> list[bytearray]:
        return [bytearray(b"x") * 2**16 for _ in range(1000)]

    del (blocks := in_small_blocks())[:]  # the C library keeps them for next time
    assert not blocks
    memory = PeakMemory("cpu")
    in_small_blocks()
    extra = memory.extra_bytes()
    assert extra is not None
    assert extra > 55 * 2**20

    after = PeakMemory("cpu").extra_bytes()
    assert after is not None
    assert after < 10 * 2**20


@LINUX
def test_available_memory_is_less_than_the_machine_has() -> None:
    available = available_bytes()
    assert available is not None
    assert 0 < available < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_worker_that_does_not_answer_in_time_is_stopped() -> None:
    worker = Worker("json.tool", environment={})  # reads to the end of its input, which does not come
    assert worker.ask({}, timeout=1)["status"] == "timed out"
    assert worker.ended
    worker.close()


def test_a_worker_that_does_not_start_says_why() -> None:
    worker = Worker("no_such_module", environment={})
    answer = worker.ask({}, timeout=60)
    assert answer["status"] == "failed"
    assert "no_such_module" in answer["note"]
    worker.close()
