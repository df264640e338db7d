"""Log-probs of target tokens from hidden states and the head's weight; see README.md beside this file."""

from stepdpo_kernels.ops.linear_logprob.api import linear_logprob
from stepdpo_kernels.ops.linear_logprob.statistics import Statistics, linear_statistics

__all__ = ["Statistics", "linear_logprob", "linear_statistics"]
