"""Step-DPO as a LightningModule.

pip install pytorch-lightning
python -m examples.loss.lightning_module
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.loss.inputs import arguments, load
from stepdpo_kernels import StepDPOLoss, pack_pairs, packed_forward
from stepdpo_kernels.types import PackedBatch

# The forests of an optimiser step and the reference's log-probs of each.
Step = list[tuple[PackedBatch, Tensor]]


class StepDPOModule(lightning.LightningModule):
    """Takes a step at a time, and its forests one after the other, so that memory holds one of them."""

    def __init__(self, model: Any, *, beta: float = 0.4, learning_rate: float = 5e-7) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.loss_fn, self.learning_rate = model, StepDPOLoss(beta), learning_rate
        self.losses: list[float] = []

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight  # (V, D)

    @torch.no_grad()
    def references(self, batches: list[PackedBatch]) -> list[Tensor]:
        return [self.loss_fn.packed_logps(packed_forward(self.model, batch), self.head, batch) for batch in batches]

    def training_step(self, step: Step, number: int) -> None:
        optimizer: Any = self.optimizers()
        num_pairs = sum(batch.num_pairs for batch, _ in step)
        loss = torch.zeros((), device=self.device)
        for batch, ref_logps in step:
            hidden = packed_forward(self.model, batch)  # (T, D)
            output = self.loss_fn.packed(hidden, self.head, batch, ref_logps, num_pairs=num_pairs)
            self.manual_backward(output.loss)
            loss += output.loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())

    def transfer_batch_to_device(self, step: Step, device: torch.device, dataloader_idx: int) -> Step:
        return [(batch.to(device), ref_logps.to(device)) for batch, ref_logps in step]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> list[float]:
    """Trains, and returns the loss of each optimiser step."""
    args = arguments(__doc__)
    model, pairs = load(args.model, args.data)
    module = StepDPOModule(model, learning_rate=args.learning_rate)
    steps = []
    for start in range(0, len(pairs), args.pairs_per_step):
        batches = pack_pairs(pairs[start : start + args.pairs_per_step], args.max_tokens)
        steps.append(list(zip(batches, module.references(batches), strict=True)))
    loader: Any = DataLoader(steps, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    trainer = lightning.Trainer(
        max_epochs=args.epochs, devices=1, logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    main()
