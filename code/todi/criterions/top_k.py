"""Divergences over a teacher's most likely tokens and a bucket with the rest."""

import torch
from torch import Tensor

from todi.criterions.definitions import divergence
from todi.criterions.parameters import Parameter


def _split(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries (N, k) of the teacher's most likely tokens; log of the rest's probability (N, 1), of either."""
    top = log_p.topk(min(k, log_p.shape[-1] - 1)).indices  # the bucket is never empty
    rest_p, rest_q = (side.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True) for side in (log_p, log_q))
    return top, rest_p, rest_q


def _value(log_p: Tensor, log_q: Tensor, top: Tensor, rest_p: Tensor, rest_q: Tensor) -> Tensor:
    p, q = (torch.cat([side.gather(-1, top), rest], -1) for side, rest in ((log_p, rest_p), (log_q, rest_q)))
    return (p.exp() * (p - q)).sum(-1)


def top_k_gradient(log_p: Tensor, log_q: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """h = -p of the top k, -q p_rest / q_rest of the rest, whose sum is -1."""
    top, rest_p, rest_q = _split(log_p, log_q, k)
    share = (log_q + (rest_p - rest_q)).exp_().scatter_(-1, top, log_p.gather(-1, top).exp_())
    return _value(log_p, log_q, top, rest_p, rest_q), log_q.exp().sub_(share)


@divergence("top_k_forward_kl", closed_form=top_k_gradient,
            k=Parameter(16, least=1, integer=True, help="tokens that count one by one"))
def top_k_forward_kl(log_p: Tensor, log_q: Tensor, *, k: int) -> Tensor:
    """KL(p || q) over the teacher's k most likely tokens and a bucket with the rest (ReTaCo, 2026).

    EOPD (2026) leaves the bucket out and makes the k a distribution of their own, which pulls the student towards them
    even where it is its teacher; with the bucket it stays.
    """
    return _value(log_p, log_q, *_split(log_p, log_q, k))
