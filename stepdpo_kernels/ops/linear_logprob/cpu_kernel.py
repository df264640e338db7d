"""The C++ CPU operator (csrc/). Placeholder until the extension lands."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def why_not(inputs: dict[str, Any]) -> list[str]:
    return ["the C++ extension is not built"]


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    raise RuntimeError("the C++ extension is not built")
