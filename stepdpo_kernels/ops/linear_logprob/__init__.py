"""Log-probs of target tokens from hidden states and the head's weight; see README.md beside this file."""

from stepdpo_kernels.ops.linear_logprob.api import grouped_logprob, linear_logprob, linear_loss
from stepdpo_kernels.ops.linear_logprob.in_forward import Ends
from stepdpo_kernels.ops.linear_logprob.statistics import Statistics, linear_statistics

__all__ = ["Ends", "Statistics", "grouped_logprob", "linear_logprob", "linear_loss", "linear_statistics"]
