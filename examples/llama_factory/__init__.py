"""Step-DPO in LLaMA-Factory: its data, and a run."""
