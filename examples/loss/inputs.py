"""What the three loops train on: a model and step pairs, small random ones unless others are named."""

from __future__ import annotations

import argparse
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stepdpo_kernels import StepPair, load_step_pairs

VOCABULARY = 256


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="folder or hub id of a causal language model; random weights without it")
    parser.add_argument("--data", help="step pairs in the released schema (JSONL); goes with --model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=8, help="of all processes together")
    parser.add_argument("--max-tokens", type=int, default=256, help="of one forward pass")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="5e-7 is the paper's, for a trained model")
    return parser.parse_args()


def load(model: str | None, data: str | None) -> tuple[Any, list[StepPair]]:
    """The model, in eval mode for there is no dropout in Step-DPO, and its pairs."""
    if model is not None and data is not None:
        pairs = load_step_pairs(data, AutoTokenizer.from_pretrained(model))
        return AutoModelForCausalLM.from_pretrained(model).eval(), list(pairs)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval(), random_pairs()


def random_pairs(problems: int = 8, steps: int = 4) -> list[StepPair]:
    """Pairs of random tokens: at each step of a problem, the step that the next pair goes on from and another one."""
    random, pairs = Random(0), []

    def tokens(least: int, most: int) -> list[int]:
        return [random.randrange(VOCABULARY) for _ in range(random.randint(least, most))]

    for problem in range(problems):
        prefix = tokens(20, 40)
        for step in range(steps):
            chosen, rejected = tokens(5, 12), tokens(5, 12)
            pairs.append(StepPair(prefix, chosen, rejected, id=f"{problem}.{step}", group=str(problem)))  # type: ignore[arg-type]
            prefix = prefix + chosen
    return pairs
