"""Sampling text behind one small protocol: transformers, vLLM, any server of the OpenAI protocol."""

from __future__ import annotations

from stepdpo_kernels.data.generation.protocol import Completion, Generator, Prompt, Sampling

__all__ = ["Completion", "Generator", "Prompt", "Sampling"]
