"""Step-DPO in OpenRLHF: its data, and a run."""
