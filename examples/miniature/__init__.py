"""Step-DPO from nothing to a picture on two CPU cores: `python -m examples.miniature`."""
