"""A process of the `forest` suite: one way to share prefixes. Reads a JSON object a line, answers each with one.

{"do": "load", "share": ..., ...}    model and batches, memory of one batch, a first pass over all
{"do": "measure"}                    seconds of a pass over all batches, forward and backward
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from benchmarks.measure import PeakMemory
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.model import head_options, packed_forward
from stepdpo_kernels.packing import build_batch, epoch_order, pack_pairs, plan_bins
from stepdpo_kernels.trainer import load_model, load_tokenizer
from stepdpo_kernels.types import PackedBatch

BETA = 0.4


class Worker:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        share, max_tokens = settings["share"], settings["max_tokens"]
        everything = load_step_pairs(settings["data"], load_tokenizer(settings["model"]))
        order = epoch_order(everything, settings["seed"], settings["sampling"], pairs_per_step=settings["pairs"])
        pairs = [everything[i] for i in order[: settings["pairs"]]]
        if len(pairs) < settings["pairs"]:
            raise SystemExit(f"{settings['data']} has {len(pairs)} pairs, not {settings['pairs']}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = load_model(settings["model"], settings["dtype"]).to(self.device).train()
        if settings["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable()
        self.loss = StepDPOLoss(beta=BETA, **head_options(self.model))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.pairs = len(pairs)
        self.batches = [batch.to(self.device) for batch in pack_pairs(pairs, max_tokens, share=share)]
        first = self.measure()
        # The fullest batch of unshared pairs: the same pairs for every `share`.
        of_memory = max(plan_bins(pairs, max_tokens, share="none"), key=len)
        extra = self.memory_of(build_batch(pairs, of_memory, share).to(self.device))
        return {
            "batches": len(self.batches),
            "tokens": sum(batch.num_tokens for batch in self.batches),
            "first_seconds": first["seconds"],
            "loss": first["loss"],
            "memory_pairs": len(of_memory),
            "extra_bytes": extra,
            "device": self.device,
        }

    def memory_of(self, batch: PackedBatch) -> int | None:
        """Peak over what was in use before, among it weights and gradients."""
        gc.collect()
        memory = PeakMemory(self.device)
        self.step(batch)
        return memory.extra_bytes()

    def step(self, batch: PackedBatch) -> Tensor:
        head = self.model.get_output_embeddings()
        reference = torch.zeros(2 * batch.num_pairs, device=self.device)
        hidden = packed_forward(self.model, batch)
        loss = self.loss.packed(hidden, head.weight, batch, reference, bias=head.bias, num_pairs=self.pairs).loss
        loss.backward()
        return loss.detach()

    def measure(self) -> dict[str, Any]:
        gc.collect()
        began = time.perf_counter()
        losses = [self.step(batch) for batch in self.batches]
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        for parameter in self.parameters:  # kept in memory, as between the micro-batches of a step
            if parameter.grad is not None:
                parameter.grad.zero_()
        return {"seconds": seconds, "loss": torch.stack(losses).sum().item()}


def main() -> None:
    results, sys.stdout = sys.stdout, sys.stderr  # progress and logs must not mix with the results
    worker = Worker()
    for line in sys.stdin:
        message = json.loads(line)
        answer = worker.load(message) if message["do"] == "load" else worker.measure()
        print(json.dumps({"status": "ok", **answer}), file=results, flush=True)


if __name__ == "__main__":
    main()
