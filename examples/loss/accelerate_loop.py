"""Step-DPO in a loop with accelerate, on one process or several.

accelerate launch -m examples.loss.accelerate_loop
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from examples.loss.inputs import arguments, load
from stepdpo_kernels import StepDPOLoss, StepDPOOutput, pack_pairs
from stepdpo_kernels.model import enable_packed_forward
from stepdpo_kernels.types import PackedBatch


def main() -> list[float]:
    """Trains, and returns the loss of each optimiser step, over all processes."""
    args = arguments(__doc__)
    accelerator = Accelerator()
    model, pairs = load(args.model, args.data)
    loss_fn = StepDPOLoss(beta=0.4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    enable_packed_forward(model)  # before it is wrapped: layers and head then run in the wrapped model's own forward
    model, optimizer = accelerator.prepare(model, optimizer)

    rank, world = accelerator.process_index, accelerator.num_processes
    steps = []
    for start in range(0, len(pairs), args.pairs_per_step):
        step = pairs[start : start + args.pairs_per_step]
        if len(step) < world:
            break  # each process must have its part in every step
        batches = [batch.to(accelerator.device) for batch in pack_pairs(step[rank::world], args.max_tokens)]
        with torch.no_grad():
            references = [model(packed_batch=batch, head=log_probs(loss_fn, batch)) for batch in batches]
        steps.append((len(step), list(zip(batches, references, strict=True))))

    losses = []
    for epoch in range(args.epochs):
        for num_pairs, parts in steps:
            loss = torch.zeros((), device=accelerator.device)
            for number, (batch, ref_logps) in enumerate(parts, 1):
                # DistributedDataParallel averages gradients over the processes, and does so once a step.
                with nullcontext() if number == len(parts) else accelerator.no_sync(model):
                    output = model(packed_batch=batch, head=pair_loss(loss_fn, batch, ref_logps, num_pairs / world))
                    accelerator.backward(output.loss)
                loss += output.loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss, "mean").item())
        accelerator.print(f"epoch {epoch + 1}: loss {sum(losses[-len(steps) :]) / len(steps):.4f}")
    return losses


def log_probs(loss_fn: StepDPOLoss, batch: PackedBatch):  # type: ignore[no-untyped-def]
    """What to do with the hidden states of a batch, inside the model's forward: log-probs."""

    def head(hidden: Tensor, lm_head: nn.Linear) -> Tensor:
        return loss_fn.packed_logps(hidden, lm_head.weight, batch, bias=lm_head.bias)

    return head


def pair_loss(loss_fn: StepDPOLoss, batch: PackedBatch, ref_logps: Tensor, num_pairs: float):  # type: ignore[no-untyped-def]
    """What to do with the hidden states of a batch, inside the model's forward: the loss."""

    def head(hidden: Tensor, lm_head: nn.Linear) -> StepDPOOutput:
        return loss_fn.packed(hidden, lm_head.weight, batch, ref_logps, bias=lm_head.bias, num_pairs=num_pairs)

    return head


if __name__ == "__main__":
    main()
