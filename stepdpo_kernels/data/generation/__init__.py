"""Sampling text behind one small protocol: transformers, vLLM, any server of the OpenAI protocol.

A generator is imported from its own module, so that none needs the packages of another: `transformers_generator`,
`vllm_generator`, `openai_generator`.
"""

from __future__ import annotations

from stepdpo_kernels.data.generation.protocol import Completion, Generator, Prompt, Sampling

__all__ = ["Completion", "Generator", "Prompt", "Sampling"]
