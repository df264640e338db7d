"""Log-probs of target tokens from hidden states and the head's weight; see README.md beside this file."""

from stepdpo_kernels.ops.linear_logprob.api import linear_logprob

__all__ = ["linear_logprob"]
