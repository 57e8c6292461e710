"""Numbers that tell of a row what its distributions are like: what weights and selections go by."""

import torch
from torch import Tensor


def entropy(log_p: Tensor) -> Tensor:
    """(N, V) -> (N,), in nats."""
    return -torch.linalg.vecdot(log_p.exp(), log_p)


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sqrt(sum (sqrt p - sqrt q)^2 / 2), (N, V) -> (N,), between 0 and 1."""
    gap = (log_p / 2).exp_().sub_((log_q / 2).exp_())
    return torch.linalg.vector_norm(gap, dim=-1).div_(2 ** 0.5)
