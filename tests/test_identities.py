"""What the objectives have in common, value and gradient in float64: each of them at a corner is another of them."""

import pytest
import torch
from todi.criterions import TARGETS, build_divergence
from todi.criterions.alpha_mixture import alpha_mixture
from torch.testing import assert_close

TEACHER, STUDENT = (2 * torch.randn(6, 23, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                    for seed in (0, 1))
Pair = tuple[torch.Tensor, torch.Tensor]  # (N,) values and (N, V) gradients


def of(name: str, *, student=STUDENT, teacher=TEACHER, temperature=1.0, **params: float) -> Pair:
    """An objective and its gradient for the student's logits, by its closed form where there is one."""
    student = student.clone().requires_grad_()
    log_p, log_q = ((side / temperature).log_softmax(-1) for side in (teacher, student.detach()))
    divergence = build_divergence(name, **params)
    by_autograd = torch.autograd.grad(divergence(student, teacher, temperature).sum(), student)[0]
    value, gradient = divergence.value_and_gradient(log_p, log_q)
    assert_close(gradient / temperature, by_autograd)
    return value, gradient / temperature


def plain(function) -> Pair:
    """A function of (p, q), written out, by autograd."""
    student = STUDENT.clone().requires_grad_()
    value = function(TEACHER.softmax(-1), student.softmax(-1))
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def scaled(pair: Pair, factor: float) -> Pair:
    return pair[0] * factor, pair[1] * factor


def mixed(first: Pair, second: Pair, share: float = 0.5) -> Pair:
    return tuple(share * one + (1 - share) * other for one, other in zip(first, second, strict=True))


ONE_SMALL = 1e-6
IDENTITIES = {
    "AB(1, 0) is forward KL": lambda: (of("abkd", alpha=1, beta=0), of("forward_kl")),
    "AB(0, 1) is reverse KL": lambda: (of("abkd", alpha=0, beta=1), of("reverse_kl")),
    "AB(1/2, 1/2) is 4 (1 - sum sqrt(pq))": lambda: (
        of("abkd", alpha=0.5, beta=0.5), plain(lambda p, q: 4 * (1 - (p * q).sqrt().sum(-1)))),
    "AB(1, 1) is half the squares": lambda: (
        of("abkd", alpha=1, beta=1), plain(lambda p, q: (p - q).square().sum(-1) / 2)),
    "AB(0, 0) is half the squares of the logarithms": lambda: (
        of("abkd", alpha=0, beta=0), plain(lambda p, q: (q / p).log().square().sum(-1) / 2)),
    "ToDi at beta 0 is the mean of both KLs": lambda: (
        of("ToDi", beta=0), mixed(of("forward_kl"), of("reverse_kl"))),
    "GKD at 1/2 is Jensen-Shannon": lambda: (of("gkd", beta=0.5), of("js_divergence")),
    "AMiD of the arithmetic mean is skewed forward KL": lambda: (
        of("amid", alpha=-1, skew_lambda=0.3, ab_alpha=1, ab_beta=0), of("skewed_forward_kl", skew_lambda=0.3)),
    "AMiD, order qr, of the arithmetic mean is skewed reverse KL": lambda: (
        of("amid_qr", alpha=-1, skew_lambda=0.3, ab_alpha=1, ab_beta=0), of("skewed_reverse_kl", skew_lambda=0.7)),
    "skewed reverse KL without what flows through its mixture": lambda: (
        of("skewed_reverse_kl_detached", skew_lambda=0.3), plain(
            lambda p, q: (q * (q / (0.7 * p + 0.3 * q).detach()).log()).sum(-1))),
    "TAID at t = 0 is 0": lambda: (of("TAID", t_start=0), scaled(of("forward_kl"), 0)),
    "TAID at t = 1 is forward KL": lambda: (of("TAID", t_start=1), of("forward_kl")),
    "Veto at beta = 0 is forward KL": lambda: (of("Veto", beta_start=0), of("forward_kl")),
    "Veto, reversed, at beta = 0 is reverse KL": lambda: (of("Veto_reverse", beta_start=0), of("reverse_kl")),
    "a scheduled ToDi begins as ToDi": lambda: (of("ToDi_scheduled", beta_start=2), of("ToDi", beta=2)),
    "EOPD with an open gate over all entries is both KLs": lambda: (
        of("EOPD", tau=-1, k=22), scaled(mixed(of("forward_kl"), of("reverse_kl")), 2)),
    "EOPD with a gate that never opens is reverse KL": lambda: (of("EOPD", tau=5), of("reverse_kl")),
    "top k of all is forward KL": lambda: (of("top_k_forward_kl", k=22), of("forward_kl")),
}
LIMITS = {
    "AB(e, b) nears AB(0, b)": lambda: (of("abkd", alpha=ONE_SMALL, beta=0.6), of("abkd", alpha=0, beta=0.6)),
    "AB(a, e) nears AB(a, 0)": lambda: (of("abkd", alpha=0.6, beta=ONE_SMALL), of("abkd", alpha=0.6, beta=0)),
    "GKD / beta nears forward KL": lambda: (
        scaled(of("gkd", beta=ONE_SMALL), 1 / ONE_SMALL), of("forward_kl")),
    "GKD / (1 - beta) nears reverse KL": lambda: (
        scaled(of("gkd", beta=1 - ONE_SMALL), 1 / ONE_SMALL), of("reverse_kl")),
    "skewed forward KL nears forward KL": lambda: (of("skewed_forward_kl", skew_lambda=ONE_SMALL), of("forward_kl")),
    "skewed reverse KL nears reverse KL": lambda: (of("skewed_reverse_kl", skew_lambda=ONE_SMALL), of("reverse_kl")),
    "AMiD of nothing but p is 0": lambda: (
        of("amid", alpha=-1, skew_lambda=1 - ONE_SMALL), scaled(of("forward_kl"), 0)),
    "AMiD, order pr, of nearly q is AB of q": lambda: (
        of("amid", alpha=0, skew_lambda=ONE_SMALL), of("abkd")),
    "AMiD's power means are continuous at the geometric one": lambda: (
        of("amid", alpha=1 - ONE_SMALL), of("amid", alpha=1)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
    assert_close(*IDENTITIES[name]())


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name):
    assert_close(*LIMITS[name](), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["abkd", "amid", "amid_qr", "gkd", "top_k_forward_kl", "TAID", "Veto", "EOPD"])
def test_logits_count_up_to_a_constant_and_gradients_sum_to_zero(name):
    value, gradient = of(name, temperature=2.0)
    shifted = of(name, student=STUDENT + torch.arange(6)[:, None], teacher=TEACHER - 3, temperature=2.0)
    assert_close(shifted, (value, gradient))
    assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))


def test_csd_by_the_students_weights_has_the_gradient_of_reverse_kl():
    """sum q_i q_j (d_i - d_j)^2 / 4 with d the difference of logits, and q constant (CSD, ICLR 2026)."""
    student, q = STUDENT.clone().requires_grad_(), STUDENT.softmax(-1)
    gap = student - TEACHER
    value = (q[:, :, None] * q[:, None] * (gap[:, :, None] - gap[:, None]).square()).sum() / 4
    assert_close(torch.autograd.grad(value, student)[0], of("reverse_kl")[1])


def test_taids_target_is_amids_geometric_mean():
    log_p, log_q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
    mean, _ = alpha_mixture(log_p, log_q, alpha=1, skew_lambda=0.3)
    assert_close(TARGETS["interpolated"](log_p, log_q, {"t": 0.3}), mean)


def test_gkd_is_bounded_by_its_entropy():
    far = torch.tensor([[30.0, 0, 0], [0, 0, 30.0]], dtype=torch.float64)
    value, _ = of("gkd", student=far, teacher=far.flip(0))
    assert_close(value, torch.full_like(value, 2).log())
