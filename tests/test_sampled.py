"""The one-sample estimate of the reverse KL: what it is on average, what it needs, and in parts of an objective."""

import pytest
import torch
from todi.criterions import DIVERGENCES, Term, build_divergence, divergence, objective
from torch.testing import assert_close

ROWS, VOCABULARY = 5, 11
STUDENT, TEACHER = (2 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed),
                                    dtype=torch.float64) for seed in (0, 1))


def value_and_gradient(name: str, temperature: float, labels: torch.Tensor | None = None):
    student = STUDENT.clone().requires_grad_()
    value = build_divergence(name)(student, TEACHER, temperature, labels)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_mean_over_the_students_own_tokens_is_the_reverse_kl(temperature):
    """Every token of the vocabulary, times its probability: nothing is drawn."""
    q = (STUDENT / temperature).softmax(-1)
    value, gradient = torch.zeros(ROWS, dtype=torch.float64), torch.zeros_like(STUDENT)
    for token in range(VOCABULARY):
        each, by_each = value_and_gradient("sampled_reverse_kl", temperature, torch.full((ROWS,), token))
        value, gradient = value + q[:, token] * each, gradient + q[:, token, None] * by_each
    assert_close((value, gradient), value_and_gradient("reverse_kl", temperature))


def test_without_labels_it_says_what_is_missing():
    with pytest.raises(ValueError, match="sampled_reverse_kl is an estimate by one token of each row: give labels"):
        build_divergence("sampled_reverse_kl")(STUDENT, TEACHER)


@pytest.fixture(autouse=True)
def registry_restored(monkeypatch):
    """A test may register what it likes."""
    monkeypatch.setattr(DIVERGENCES, "_entries", dict(DIVERGENCES._entries))


def test_it_can_be_a_part_of_an_objective():
    """As EOPD has it: sampled where its paper samples, exact in the rest."""
    objective("sampled_EOPD", Term("sampled_reverse_kl"), Term("top_k_forward_kl", weight="unsure_teacher"), help="")
    labels = torch.tensor([3, 0, 10, 3, 5])
    found, sampled, exact, both = (value_and_gradient(name, 1.0, labels) for name in (
        "sampled_EOPD", "sampled_reverse_kl", "reverse_kl", "EOPD"))
    assert_close(found, tuple(one + more - less for one, more, less in zip(sampled, both, exact, strict=True)))
    built, (log_p, log_q) = build_divergence("sampled_EOPD"), (side.log_softmax(-1) for side in (TEACHER, STUDENT))
    assert_close(built.value_and_gradient(log_p, log_q, labels), found)
    with pytest.raises(ValueError, match="sampled_EOPD is an estimate by one token of each row"):
        built(STUDENT, TEACHER)


def test_one_that_is_sampled_takes_labels():
    with pytest.raises(TypeError, match="labels"):
        divergence("mine", sampled=True)(lambda log_p, log_q: None)
    with pytest.raises(TypeError, match="labels"):
        divergence("mine")(lambda log_p, log_q, *, labels: None)

    @divergence("mine", sampled=True)
    def mine(log_p, log_q, *, labels):
        return -log_q.gather(-1, labels[:, None]).squeeze(-1)

    assert_close(build_divergence("mine")(STUDENT, TEACHER, labels=torch.arange(ROWS)),
                 torch.nn.functional.cross_entropy(STUDENT, torch.arange(ROWS), reduction="none"))
