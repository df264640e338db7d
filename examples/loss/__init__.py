"""StepDPOLoss in loops of your own: plain PyTorch, accelerate, Lightning."""
