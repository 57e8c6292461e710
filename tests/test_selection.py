"""Objectives that count some rows of each sample only: which rows, the loss and its gradients, and what is computed."""

import math

import pytest
import reference
import torch
from todi.criterions import DistillationCriterion, HeadRows, LinearHead, LogitRows, MeanRows, build_divergence
from todi.criterions import linear_head as head_module
from todi.criterions.selection import cooler_where_larger, largest_of_each
from torch.testing import assert_close

COUNTS = (7, 0, 1, 5, 3)
ROWS, VOCABULARY, INF = sum(COUNTS), 11, float("inf")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_of(values: torch.Tensor, counts: tuple[int, ...], share: float) -> list[int]:
    """Row by row: of each sample those with the largest values."""
    kept, first = [], 0
    for count in counts:
        rows = sorted(range(first, first + count), key=lambda row: -values[row].item())
        kept += sorted(rows[:math.ceil(round(share * count, 6))])
        first += count
    return kept


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.6, 1.0])
def test_the_largest_of_each_sample(share):
    values = draw(ROWS, seed=0)
    assert largest_of_each(values, COUNTS, share).tolist() == kept_of(values, COUNTS, share)
    assert largest_of_each(torch.ones(ROWS), COUNTS, 0.4).tolist() == [0, 1, 2, 7, 8, 9, 13, 14]  # the first of equals
    assert not len(largest_of_each(torch.ones(0), (), share)) and not len(largest_of_each(torch.ones(0), (0,), share))


@pytest.mark.parametrize("kd_rate", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_vocabulary", [VOCABULARY, 15, 9])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_loss_and_gradients(kd_rate, temperature, teacher_vocabulary, chunk_size):
    """Against full logits, where both vocabularies may be padded and entries masked."""
    hidden, weight, bias = draw(ROWS, 4, seed=1), draw(VOCABULARY, 4, seed=2), draw(VOCABULARY, seed=3)
    bias[4] = -INF
    labels = torch.arange(ROWS) % 4
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight)]
    teacher = HeadRows(draw(ROWS, 5, seed=4), LinearHead(draw(teacher_vocabulary, 5, seed=5)))
    criterion = DistillationCriterion(build_divergence("SE_KD", share=0.4), temperature, kd_rate,
                                      chunk_size=chunk_size)
    found = criterion(hidden, LinearHead(weight, bias), labels, teacher, COUNTS)

    vocabulary = min(VOCABULARY, teacher_vocabulary)
    z, t = (hidden @ weight.T + bias)[:, :vocabulary], teacher.head(teacher.hidden)[:, :vocabulary]
    q = (z / temperature).softmax(-1)
    kept = kept_of(-(q * q.clamp_min(1e-300).log()).sum(-1), COUNTS, 0.4)
    kd = reference.divergence("forward_kl", z[kept], t[kept], temperature).sum() / 0.4
    ce = sum(reference.cross_entropy(row, label, 0.0) for row, label in zip(z, labels.tolist(), strict=True))
    expected = (1 - kd_rate) * ce + kd_rate * kd
    assert_close((found["loss"], found["kd"], found["ce"]), (expected, kd.detach(), ce.detach()))
    assert (found["tokens"], found["correct"]) == (ROWS, (z.argmax(-1) == labels).sum())
    assert_close(torch.autograd.grad(found["loss"], leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("kd_rate", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_vocabulary", [15, 9])
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_rows_with_temperatures(kd_rate, temperature, teacher_vocabulary, teachers, share):
    """AdaKD, row by row: the rows by their Hellinger distance, then the temperature of each and its square."""
    hidden, weight, bias = draw(ROWS, 4, seed=1), draw(VOCABULARY, 4, seed=2), draw(VOCABULARY, seed=3)
    bias[4] = -INF
    labels, leaves = torch.arange(ROWS) % 4, [leaf.requires_grad_() for leaf in (hidden, weight)]
    single = HeadRows(draw(ROWS, 5, seed=4), LinearHead(draw(teacher_vocabulary, 5, seed=5)))
    teacher = single if teachers == 1 else MeanRows([single, single], [1, 2])
    divergence = build_divergence("AdaKD", temperature_range=0.7).at({"share": share})
    criterion = DistillationCriterion(divergence, temperature, kd_rate, chunk_size=2)
    found = criterion(hidden, LinearHead(weight, bias), labels, teacher, COUNTS)

    vocabulary = min(VOCABULARY, teacher_vocabulary)
    z, t = (hidden @ weight.T + bias)[:, :vocabulary], single.head(single.hidden)[:, :vocabulary]
    distances = torch.stack([(1 - (p * q).sqrt().sum()).sqrt()
                             for p, q in reference.probabilities(z.detach(), t, temperature)])
    kept, kd, first = kept_of(distances, COUNTS, share), 0, 0
    for count in COUNTS:
        rows = [row for row in kept if first <= row < first + count]
        median = sorted(distances[rows].tolist())[(len(rows) - 1) // 2] if rows else None
        for row in rows:
            own = temperature * math.exp(-0.7 * math.tanh(math.log(distances[row].item() / median)))
            kd = kd + own ** 2 * reference.divergence("reverse_kl", z[[row]], t[[row]], own)[0]
        first += count
    kd = kd / share
    ce = sum(reference.cross_entropy(row, label, 0.0) for row, label in zip(z, labels.tolist(), strict=True))
    expected = (1 - kd_rate) * ce + kd_rate * kd
    assert_close((found["loss"], found["kd"], found["ce"]), (expected, kd.detach(), ce.detach()))
    assert_close(torch.autograd.grad(found["loss"], leaves), torch.autograd.grad(expected, leaves))


def test_rows_that_are_the_teachers_have_the_common_temperature():
    """Their distances are 0, and so is the median."""
    assert cooler_where_larger(torch.zeros(5), (2, 0, 3), temperature_range=0.5).tolist() == [1] * 5
    assert cooler_where_larger(torch.tensor([0, 0, 1.0]), (3,), temperature_range=0.5).tolist() == pytest.approx(
        [1, 1, math.exp(-0.5)])
    assert not len(cooler_where_larger(torch.zeros(0), (), temperature_range=0.5))


def test_a_sample_does_not_depend_on_the_others():
    """Samples one by one are the samples at once: so a step may be cut in any way."""
    hidden, head = draw(ROWS, 4, seed=1), LinearHead(draw(VOCABULARY, 4, seed=2))
    teacher, labels = HeadRows(draw(ROWS, 4, seed=4), LinearHead(draw(VOCABULARY, 4, seed=5))), torch.arange(ROWS) % 4
    for divergence in (build_divergence("SE_KD"), build_divergence("AdaKD").at({"share": 0.5})):
        criterion = DistillationCriterion(divergence, 2.0, 0.3)
        whole = criterion(hidden, head, labels, teacher, COUNTS)
        parts = [criterion(hidden[rows], head, labels[rows], teacher.taken(rows), (len(rows),))
                 for rows in torch.arange(ROWS).split(COUNTS)]
        assert_close(whole, {name: sum(part[name] for part in parts) for name in whole})


def test_a_share_of_all_is_the_whole():
    hidden, head = draw(ROWS, 4, seed=1).requires_grad_(), LinearHead(draw(VOCABULARY, 4, seed=2).requires_grad_())
    teacher, labels = HeadRows(draw(ROWS, 4, seed=4), LinearHead(draw(VOCABULARY, 4, seed=5))), torch.arange(ROWS) % 4
    all_rows = DistillationCriterion(build_divergence("SE_KD", share=1), 2.0, 0.3, 0.1)
    plain = DistillationCriterion(build_divergence("forward_kl"), 2.0, 0.3, 0.1)
    found, expected = (each(hidden, head, labels, teacher, COUNTS) for each in (all_rows, plain))
    assert_close(found, expected)
    leaves = [hidden, head.weight]
    assert_close(torch.autograd.grad(found["loss"], leaves), torch.autograd.grad(expected["loss"], leaves))


def test_the_teachers_head_is_computed_for_the_kept_rows_alone(monkeypatch):
    seen = []
    plain = head_module.LinearHead.rows
    monkeypatch.setattr(head_module.LinearHead, "rows",
                        lambda self, hidden: (seen.append(hidden.shape), plain(self, hidden))[1])
    teacher = HeadRows(draw(ROWS, 5, seed=4), LinearHead(draw(VOCABULARY, 5, seed=5)))
    student = draw(ROWS, 4, seed=1), LinearHead(draw(VOCABULARY, 4, seed=2)), torch.zeros(ROWS, dtype=torch.long)
    DistillationCriterion(build_divergence("SE_KD", share=0.2), 1.0, 1.0)(*student, teacher, COUNTS)
    assert sum(rows for rows, width in seen if width == 5) == 2 + 1 + 1 + 1


def test_what_a_teacher_says_of_some_rows():
    rows, every = torch.tensor([5, 2, 9]), slice(None)
    single = HeadRows(draw(ROWS, 5, seed=4), LinearHead(draw(VOCABULARY, 5, seed=5)), {3: draw(ROWS, 2, seed=6)})
    for teacher in (single, LogitRows(draw(ROWS, VOCABULARY, seed=7)),
                    MeanRows([single, LogitRows(draw(ROWS, VOCABULARY, seed=7))], [1, 2])):
        whole, some = (each.logits(every, VOCABULARY, 2.0) for each in (teacher, teacher.taken(rows)))
        assert_close(some, whole[rows])
    assert_close(single.taken(rows).layers[3], single.layers[3][rows])


@pytest.mark.parametrize(("counts", "said"), [(None, "SE_KD selects rows of each sample: say how many each has"),
                                              ((1, 2), "counts must be those of the 16 rows, got 3")])
def test_the_samples_must_be_known(counts, said):
    teacher = HeadRows(draw(ROWS, 5, seed=4), LinearHead(draw(VOCABULARY, 5, seed=5)))
    student = draw(ROWS, 4, seed=1), LinearHead(draw(VOCABULARY, 4, seed=2)), torch.zeros(ROWS, dtype=torch.long)
    with pytest.raises(ValueError, match=said):
        DistillationCriterion(build_divergence("SE_KD"), 1.0, 1.0)(*student, teacher, counts)
