"""Step-DPO in a loop of plain PyTorch.

python -m examples.loss.bare
"""

from __future__ import annotations

import torch

from examples.loss.inputs import arguments, load
from stepdpo_kernels import StepDPOLoss, pack_pairs, packed_forward


def main() -> list[float]:
    """Trains, and returns the loss of each optimiser step."""
    args = arguments(__doc__)
    model, pairs = load(args.model, args.data)
    head = model.get_output_embeddings().weight
    loss_fn = StepDPOLoss(beta=0.4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    # An optimiser step is some pairs, packed into as few forests as the token budget allows. The model as it is now is
    # the reference: its log-probs are computed once, in the forests that are trained on.
    steps = []
    for start in range(0, len(pairs), args.pairs_per_step):
        batches = pack_pairs(pairs[start : start + args.pairs_per_step], args.max_tokens)
        with torch.no_grad():
            references = [loss_fn.packed_logps(packed_forward(model, batch), head, batch) for batch in batches]
        steps.append(list(zip(batches, references, strict=True)))

    losses = []
    for epoch in range(args.epochs):
        for step in steps:
            num_pairs = sum(batch.num_pairs for batch, _ in step)
            loss = 0.0
            for batch, ref_logps in step:
                hidden = packed_forward(model, batch)  # (T, D)
                output = loss_fn.packed(hidden, head, batch, ref_logps, num_pairs=num_pairs)
                output.loss.backward()  # the parts add up to the mean over the step's pairs
                loss += output.loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        print(f"epoch {epoch + 1}: loss {sum(losses[-len(steps) :]) / len(steps):.4f}")
    return losses


if __name__ == "__main__":
    main()
