"""Tasks for lm-evaluation-harness: GSM8K and MATH as `stepdpo evaluate` asks and grades them."""
