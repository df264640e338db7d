"""Tiny products are fastest on one thread; a test that is about threads sets its own number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.trainer.training import make_config, make_pairs

if TYPE_CHECKING:
    from stepdpo_kernels.data import StepPairDataset
    from stepdpo_kernels.trainer import StepDPOConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pairs(step_records: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path) -> StepPairDataset:
    """24 pairs of six problems, 53 to 100 tokens each."""
    return make_pairs(step_records(6, 4), tiny_tokenizer(), tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., StepDPOConfig]:
    """config(**fields): 4 pairs a step, about two forward passes each, nothing saved, everything in tmp_path."""

    def make(**fields: Any) -> StepDPOConfig:
        return make_config(tmp_path, **fields)

    return make
