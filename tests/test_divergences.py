"""Every registered divergence against an independent reference in float64, and at the edges of float32."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from todi.criterions import (
    DIVERGENCES,
    Parameter,
    build_divergence,
    diagnose,
    diagnosis,
    divergence,
    linear_distillation_loss,
)
from todi.criterions import LinearHead as Head
from todi.criterions.definitions import log_probabilities, markdown_table
from todi.criterions.divergences import adaptive_kl_weight
from torch.testing import assert_close

NAMES = list(DIVERGENCES)
CLOSED_FORMS = [name for name in DIVERGENCES if DIVERGENCES[name].closed_form]
PUBLISHED = {"skewed_forward_kl": {"skew_lambda": 0.1}, "skewed_reverse_kl": {"skew_lambda": 0.1},
             "adaptive_kl": {"alpha": 0.5}, "ToDi": {"beta": 1.0}, "gkd": {"beta": 0.5},
             "abkd": {"alpha": 0.2, "beta": 0.7}, "top_k_forward_kl": {"k": 16},
             "TAID": {"t_start": 0.4, "t_end": 1, "t_rate": 5e-4, "t_momentum": 0.99},
             **dict.fromkeys(("Veto", "Veto_reverse"), {"beta_start": 0.8, "beta_end": 0}),
             "ToDi_scheduled": {"beta_start": 0, "beta_end": 1}, "EOPD": {"k": 16, "tau": 0.8, "alpha": 1},
             "SE_KD": {"share": 0.2},
             "AdaKD": {"share_start": 1, "share_least": 0.1, "share_rate": 0.05, "share_tolerance": 0.05,
                       "share_momentum": 0.99, "share_wait": 0.05, "temperature_range": 0.5},
             "skewed_reverse_kl_detached": {"skew_lambda": 0.1},
             **dict.fromkeys(("amid", "amid_qr"), {"alpha": -5, "skew_lambda": 0.1, "ab_alpha": 0.2, "ab_beta": 0.7})}
OTHERS = [("skewed_forward_kl", {"skew_lambda": 0.7}), ("skewed_reverse_kl", {"skew_lambda": 0.7}),
          ("adaptive_kl", {"alpha": 0.0}), ("adaptive_kl", {"alpha": 0.2}), ("adaptive_kl", {"alpha": 0.8}),
          ("ToDi", {"beta": 0.0}), ("ToDi", {"beta": 3.5}), ("gkd", {"beta": 0.1}), ("gkd", {"beta": 0.9}),
          *(("abkd", {"alpha": alpha, "beta": beta}) for alpha, beta in
            ((1, 0), (0, 1), (0.5, 0.5), (1, 1), (0, 0.6), (0.6, 0), (2, 1.5))),
          *((name, {"alpha": alpha}) for name in ("amid", "amid_qr") for alpha in (-1, 0, 1, 3)),
          *((name, {"ab_alpha": 1, "ab_beta": 0, "skew_lambda": 0.6}) for name in ("amid", "amid_qr")),
          ("TAID", {"t_start": 0}), ("TAID", {"t_start": 1}), ("Veto", {"beta_start": 0}),
          ("Veto", {"beta_start": 1.5}),
          ("Veto_reverse", {"beta_start": 0.3}), ("ToDi_scheduled", {"beta_start": 3.5}),
          ("skewed_reverse_kl_detached", {"skew_lambda": 0.7}),
          ("EOPD", {"k": 3, "tau": 1.2, "alpha": 2}), ("top_k_forward_kl", {"k": 1}), ("top_k_forward_kl", {"k": 5})]
# Relative and absolute error of a float32 gradient in peaked rows: powers of a difference that rounding has eaten.
ROUGHER = {"abkd": (1e-3, 0), "amid": (1e-3, 1e-5), "amid_qr": (1e-3, 1e-5)}
INF = float("inf")
EXACT = [name for name in NAMES if name not in reference.SAMPLED]

every_divergence = pytest.mark.parametrize("name", NAMES)
every_setting = pytest.mark.parametrize("name, params", [(name, {}) for name in NAMES] + OTHERS)


def logits(*shape: int, seed: int = 0, spread: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def labels(rows: int, vocabulary: int) -> torch.Tensor:
    """What the sampled ones look at; the others leave them alone."""
    return 3 * torch.arange(rows) % vocabulary


def extreme_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """(9, 6) float32 of student and teacher: what has made losses and gradients infinite before."""
    far, lone = torch.tensor([1e4, -1e4, 0., 1e4, -1e4, 5.]), torch.tensor([-INF, -INF, 1., -INF, -INF, -INF])
    mild, other = (logits(6, seed=seed, dtype=torch.float32) for seed in (2, 3))
    hole, other_hole = mild.clone(), other.clone()
    hole[[0, 3]], other_hole[[3, 5]] = -INF, -INF
    pairs = [(far, -far), (far, far.roll(1)), (far, mild), (mild, far), (hole, other), (mild, other_hole),
             (hole, other_hole), (lone, far), (torch.full((6,), -1e4), torch.full((6,), 1e4))]
    student, teacher = zip(*pairs, strict=True)
    return torch.stack(student), torch.stack(teacher)


class OursBehindReference(torch.autograd.Function):
    """The reference's value with its weights held still, and our gradient: gradcheck compares the two."""

    @staticmethod
    def forward(ctx, student, teacher, divergence, temperature, weights):
        ctx.divergence, ctx.temperature = divergence, temperature
        ctx.save_for_backward(student, teacher)
        return reference.divergence(divergence.name, student, teacher, temperature, weights, labels(*student.shape),
                                    **divergence.params)

    @staticmethod
    def backward(ctx, grad):
        student, teacher = ctx.saved_tensors
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            value = ctx.divergence(student, teacher, ctx.temperature, labels(*student.shape))
            gradient, = torch.autograd.grad(value, student, grad)
        return gradient, None, None, None, None


def test_every_divergence_has_a_reference():
    missing = set(DIVERGENCES) - set(reference.DIVERGENCES)
    assert not missing, f"no independent reference for {missing}: add one to tests/reference.py"


def test_parameters_have_their_published_defaults():
    assert {name: build_divergence(name).params for name in NAMES} == {name: PUBLISHED.get(name, {}) for name in NAMES}


@every_setting
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value(name, params, temperature):
    student, teacher = logits(7, 13), logits(7, 13, seed=1)
    value = build_divergence(name, **params)(student, teacher, temperature, labels(7, 13))
    assert value.shape == (7,) and value.dtype == torch.float64
    assert_close(value, reference.divergence(name, student, teacher, temperature, labels=labels(7, 13), **params))


@every_setting
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient(name, params, temperature):
    student, teacher = logits(3, 7).requires_grad_(), logits(3, 7, seed=1)
    weights = reference.weights(name, student, teacher, temperature, labels(3, 7), **params)
    divergence = build_divergence(name, **params)
    assert torch.autograd.gradcheck(OursBehindReference.apply, (student, teacher, divergence, temperature, weights))


@pytest.mark.parametrize("name", sorted(reference.WEIGHTS.keys() - {"ToDi_scheduled"}))  # its weight is 1/2 at first
def test_gradient_leaves_the_weight_still(name):
    """The check above must tell a detached weight from one that moves with the student."""
    args = logits(3, 7).requires_grad_(), logits(3, 7, seed=1), build_divergence(name), 1.0, None
    assert not torch.autograd.gradcheck(OursBehindReference.apply, args, raise_exception=False)


@pytest.mark.parametrize("name, params", [(name, {}) for name in CLOSED_FORMS] +
                         [(name, params) for name, params in OTHERS if name in CLOSED_FORMS])
@pytest.mark.parametrize("pair", [(logits(5, 11), logits(5, 11, seed=1)), extreme_logits()], ids=["mild", "extreme"])
def test_closed_form_is_what_autograd_gives(name, params, pair):
    divergence = build_divergence(name, **params)
    log_p, log_q = log_probabilities(*(side.double() for side in pair), 1.0)
    given, sampled = (log_p.clone(), log_q.clone()), labels(*log_p.shape)
    assert_close(divergence.value_and_gradient(log_p, log_q, sampled),
                 divergence.value_and_autograd(log_p, log_q, sampled))
    assert_close((log_p, log_q), given, rtol=0, atol=0)  # in-place work must not reach the arguments


# With alpha = 0, entries whose probability is 0 in float32 are the tail; float64 knows none.
@pytest.mark.parametrize("name, params", [(name, {}) for name in NAMES] + [each for each in OTHERS if each[1] !=
                                                                           {"alpha": 0.0}])
@pytest.mark.parametrize("spread", [2, 24])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32_gradient_keeps_its_digits(name, params, spread, temperature):
    """Relative to the largest of its row, also in rows so peaked that the gradients are tiny differences."""
    student, teacher = (logits(600, 301, seed=seed, spread=spread, dtype=torch.float32) for seed in (0, 3))
    divergence, sampled = build_divergence(name, **params), labels(*student.shape)
    log_p, log_q = log_probabilities(student, teacher, temperature)
    _, found = divergence.value_and_gradient(log_p, log_q, sampled)
    _, wanted = divergence.value_and_autograd(
        *log_probabilities(student.double(), teacher.double(), temperature), sampled)
    _, of_rounded = divergence.value_and_autograd(*(side.double().log_softmax(-1) for side in (log_p, log_q)), sampled)
    error, rounding = ((side - wanted).abs().amax(-1) for side in (found, of_rounded))
    loss_of_float64 = 1e-13
    share, floor = ROUGHER.get(name, (2e-4, 0))
    assert (error <= share * wanted.abs().amax(-1) + rounding + loss_of_float64 + floor).all()


def test_float32_autograd_loses_digits():
    """The check above can fail."""
    student, teacher = (logits(600, 301, seed=seed, spread=24, dtype=torch.float32) for seed in (0, 3))
    divergence = build_divergence("js_divergence")
    _, found = divergence.value_and_autograd(*log_probabilities(student, teacher, 1.0))
    _, wanted = divergence.value_and_autograd(*log_probabilities(student.double(), teacher.double(), 1.0))
    assert ((found - wanted).abs().amax(-1) > wanted.abs().amax(-1)).any()


@every_divergence
def test_extreme_and_masked_logits(name):
    student, teacher = extreme_logits()
    student.requires_grad_()
    value = build_divergence(name)(student, teacher, labels=labels(*student.shape))
    value.sum().backward()
    assert value.isfinite().all() and ((value >= 0).all() or name not in EXACT)
    assert student.grad.isfinite().all()
    assert (student.grad[student.isneginf() | teacher.isneginf()] == 0).all()


@every_divergence
def test_masked_entries_carry_no_probability_in_either_model(name):
    student, teacher = (side[4:7].double() for side in extreme_logits())  # the rows with holes and nothing extreme
    sampled = labels(*student.shape)
    assert_close(build_divergence(name)(student, teacher, labels=sampled),
                 reference.divergence(name, student, teacher, labels=sampled))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in reference.SHARPENING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_distributions_are_exactly_zero_apart(name, dtype, temperature):
    student = torch.cat([logits(4, 501, spread=spread, dtype=dtype) for spread in (0, 1, 10, 1000)])
    student[::2, 17] = -INF
    teacher = student.clone()
    value = build_divergence(name)(student.requires_grad_(), teacher, temperature, labels(*student.shape))
    assert value.dtype == torch.float32
    assert (value == 0).all()
    value.sum().backward()
    assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), spread=st.floats(0.01, 30), noise=st.floats(-8, 1), size=st.integers(1, 400))
def test_never_negative(seed, spread, noise, size):
    teacher = logits(3, size, seed=seed, spread=spread, dtype=torch.float32)
    student = teacher + logits(3, size, seed=seed + 1, spread=10**noise, dtype=torch.float32)
    for name in EXACT:
        assert (build_divergence(name)(student, teacher) >= 0).all(), name


@pytest.mark.parametrize("name", reference.SHARPENING)
def test_what_sharpens_a_student_that_is_its_teacher(name):
    student = logits(4, 11).requires_grad_()
    value = build_divergence(name)(student, student.detach())
    gradient, = torch.autograd.grad(value.sum(), student)
    assert (value > 0.01).all() and (gradient.gather(-1, student.argmax(-1, keepdim=True)) < 0).all()


@every_divergence
def test_half_precision_logits_are_reduced_in_float32(name):
    student, teacher = logits(4, 301, dtype=torch.bfloat16), logits(4, 301, seed=1, dtype=torch.bfloat16)
    value = build_divergence(name)(student, teacher, labels=labels(4, 301))
    assert_close(value.double(), reference.divergence(name, student, teacher, labels=labels(4, 301)),
                 rtol=1e-5, atol=1e-6)


@every_divergence
def test_one_row_and_no_gradient_for_the_teacher(name):
    student, teacher = logits(5, 11).requires_grad_(), logits(5, 11, seed=1).requires_grad_()
    divergence = build_divergence(name)
    values = divergence(student, teacher, labels=labels(5, 11))
    assert_close(divergence(student[:1], teacher[:1], labels=labels(1, 11)), values[:1])
    values.sum().backward()
    assert student.grad.any() and teacher.grad is None


@every_divergence
def test_names_are_case_insensitive(name):
    assert build_divergence(name.upper()) == build_divergence(name.lower()) == build_divergence(name)
    assert build_divergence(name.upper()).name == name


def test_unknown_name_lists_the_allowed_and_suggests():
    with pytest.raises(ValueError, match="'foward_kl'; did you mean forward_kl") as error:
        build_divergence("foward_kl")
    assert all(name in str(error.value) for name in NAMES) and len(NAMES) >= 8


def test_unknown_parameter_lists_the_allowed_and_suggests():
    with pytest.raises(ValueError, match="ToDi has no parameter 'betta'; did you mean beta.*allowed: beta"):
        build_divergence("ToDi", betta=1.0)
    with pytest.raises(ValueError, match="forward_kl has no parameter 'beta'; allowed: none"):
        build_divergence("forward_kl", beta=1.0)


@pytest.mark.parametrize("name, parameter, values", [
    ("skewed_forward_kl", "skew_lambda", [0, 1, -0.1, 1e-9, float("nan")]),
    ("skewed_reverse_kl", "skew_lambda", [0, 1, 1.1, 1 - 1e-9, float("nan")]),
    ("adaptive_kl", "alpha", [-0.1, 1.1, float("nan")]),
    ("ToDi", "beta", [-1, INF, float("nan")])])
def test_parameter_out_of_range(name, parameter, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{parameter} must be .*got {value}"):
            build_divergence(name, **{parameter: value})


@pytest.mark.parametrize("name", ["skewed_forward_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize("skew", [1e-6, 1 - 1e-6])
def test_skew_at_its_limits_is_finite(name, skew):
    student, teacher = extreme_logits()
    value = build_divergence(name, skew_lambda=skew)(student.requires_grad_(), teacher)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


def test_range_of_a_parameter_in_words_and_in_effect():
    closed, opened = Parameter(0, least=0, most=1, help=""), Parameter(0.5, above=0, below=1, help="")
    assert closed.check("share", 0) == 0 and closed.check("share", 1) == 1 and opened.check("share", 1e-9) == 1e-9
    for value in (-1e-9, 1 + 1e-9, float("nan"), -INF):
        with pytest.raises(ValueError, match=f"share must be at least 0 and at most 1, got {value}"):
            closed.check("share", value)
    for value in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"share must be above 0 and below 1, got {value}"):
            opened.check("share", value)
    assert Parameter(1, least=0, help="").allowed == "at least 0 and finite"
    for value in (INF, -INF, float("nan")):
        with pytest.raises(ValueError, match="shift must be finite, got"):
            Parameter(0, help="").check("shift", value)


def test_registry_refuses_a_name_twice():
    with pytest.raises(ValueError, match="'todi' is registered twice"):
        divergence("todi")(lambda log_p, log_q: None)


@pytest.fixture
def registry_restored(monkeypatch):
    """A test may register what it likes."""
    monkeypatch.setattr(DIVERGENCES, "_entries", dict(DIVERGENCES._entries))


def test_functions_must_take_the_parameters(registry_restored):
    def takes_none(log_p, log_q):
        raise AssertionError("called though only registered")

    beta = Parameter(1.0, help="")
    with pytest.raises(TypeError, match="beta"):
        divergence("one", beta=beta)(takes_none)
    with pytest.raises(TypeError, match="beta"):
        divergence("two", closed_form=takes_none, beta=beta)(lambda log_p, log_q, *, beta: None)
    with pytest.raises(TypeError, match="beta"):
        divergence("three")(lambda log_p, log_q, *, beta: None)
    divergence("four")(takes_none)
    build_divergence("four")
    assert list(DIVERGENCES) == [*NAMES, "four"]


def test_a_ninth_divergence_is_one_function_and_one_decorator(registry_restored):
    @divergence("squared_hellinger", factor=Parameter(1.0, least=0, help="of the value"))
    def squared_hellinger(log_p, log_q, *, factor):
        return factor * ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)

    ninth = build_divergence("Squared_Hellinger", factor=0.5)
    student, teacher, identity = logits(5, 11).requires_grad_(), logits(5, 11, seed=1), Head(torch.eye(11).double())
    expected = 1 - (student.softmax(-1) * teacher.softmax(-1)).sqrt().sum(-1)
    assert_close(ninth(student, teacher), expected)
    sums = linear_distillation_loss(student, identity, teacher, identity, torch.arange(5), divergence=ninth, kd_rate=1)
    assert_close(sums.loss, expected.sum())
    assert_close(torch.autograd.grad(sums.loss, student), torch.autograd.grad(expected.sum(), student))


@pytest.fixture
def top_k_kl(registry_restored):
    """A divergence that looks at the whole row: no single entry decides what it counts for."""
    @divergence("top_k_kl", k=Parameter(10, least=1, integer=True, help="entries that count one by one"))
    def top_k_kl(log_p, log_q, *, k):
        entries = log_p.topk(min(k, log_p.shape[-1] - 1)).indices
        p, q = (torch.cat([side.gather(-1, entries), side.scatter(-1, entries, -INF).logsumexp(-1, keepdim=True)], -1)
                for side in (log_p, log_q))
        return (p.exp() * (p - q)).sum(-1)


def test_top_k_parameter(top_k_kl):
    assert build_divergence("top_k_kl").params == {"k": 10}
    k = build_divergence("top_k_kl", k=3.0).params["k"]  # the command line knows numbers only
    assert k == 3 and type(k) is int
    for value in (0, -1, 2.5, INF, float("nan")):
        with pytest.raises(ValueError, match=f"k must be at least 1 and a whole number, got {value}"):
            build_divergence("top_k_kl", k=value)


@pytest.mark.parametrize("k", [1, 3, 10, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_trains_through_the_chunked_loss(top_k_kl, k, temperature):
    hidden, weight = logits(7, 5).requires_grad_(), logits(11, 5, seed=1).requires_grad_()
    teacher_hidden, teacher_weight = logits(7, 6, seed=2), logits(11, 6, seed=3)
    sums = linear_distillation_loss(hidden, Head(weight), teacher_hidden, Head(teacher_weight), torch.arange(7),
                                    divergence=build_divergence("top_k_kl", k=k), temperature=temperature, kd_rate=1,
                                    chunk_size=3)
    expected = torch.zeros((), dtype=torch.float64)
    for p, q in reference.probabilities(hidden @ weight.T, teacher_hidden @ teacher_weight.T, temperature):
        order = p.argsort(descending=True)
        top, rest = order[:k], order[k:]
        expected = expected + reference.kl(p[top], q[top])
        if len(rest):
            expected = expected + reference.kl(p[rest].sum(), q[rest].sum())
    assert_close(sums.loss, expected)
    assert_close(torch.autograd.grad(sums.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)))


def test_markdown_table_has_a_row_for_each():
    rows = dict(zip(NAMES, markdown_table().splitlines()[2:], strict=True))
    assert all(f"`{name}`" in row and row.replace("\\|", "").count("|") == 4 for name, row in rows.items())
    assert rows["ToDi"].startswith("| `ToDi` | Forward and reverse KL mixed for each vocabulary entry (Jung et al., ")
    assert "`beta=1.0`, at least 0 and finite: " in rows["ToDi"] and "(Hinton et al., 2015)" in rows["forward_kl"]


def test_diagnose():
    student, teacher = logits(6, 9), logits(6, 9, seed=1)
    rows = list(reference.probabilities(student, teacher, 2.0))
    weights = reference.weights("ToDi", student, teacher, 2.0, beta=0.7)
    forward = sum((w * p * (p / q).log()).sum() for w, (p, q) in zip(weights, rows, strict=True))
    reverse = sum(((1 - w) * q * (q / p).log()).sum() for w, (p, q) in zip(weights, rows, strict=True))
    mean = {"teacher_entropy": [-(p * p.log()).sum() for p, _ in rows],
            "student_entropy": [-(q * q.log()).sum() for _, q in rows],
            "top1_agreement": [(p.argmax() == q.argmax()).double() for p, q in rows],
            "forward_kl": [reference.kl(p, q) for p, q in rows],
            "reverse_kl": [reference.kl(q, p) for p, q in rows],
            "weight_under_p": [(w * p).sum() for w, (p, _) in zip(weights, rows, strict=True)],
            "weight_under_q": [(w * q).sum() for w, (_, q) in zip(weights, rows, strict=True)]}
    expected = {name: torch.stack(values).mean().item() for name, values in mean.items()}
    expected["forward_share"] = (forward / (forward + reverse)).item()
    expected["reverse_share"] = (reverse / (forward + reverse)).item()
    blocks = [diagnose(student[rows], teacher[rows], build_divergence("ToDi", beta=0.7), 2.0)
              for rows in (slice(2), slice(2, None))]
    sums = {name: float(value + blocks[1][name]) for name, value in blocks[0].items()}
    assert diagnosis(sums) == pytest.approx(expected)


def test_diagnose_without_an_entry_weight_and_without_a_loss():
    same = logits(4, 9)
    plain = diagnosis({name: float(value) for name, value in
                       diagnose(same, same, build_divergence("forward_kl")).items()})
    assert set(plain) == {"teacher_entropy", "student_entropy", "top1_agreement", "forward_kl", "reverse_kl"}
    report = diagnosis({name: float(value) for name, value in
                        diagnose(same, same, build_divergence("ToDi")).items()})
    assert report["forward_share"] == report["reverse_share"] == 0.5 == pytest.approx(report["weight_under_p"])
    assert report["top1_agreement"] == 1 and report["forward_kl"] == 0
    assert diagnosis({}) == {}


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaptive_kl_weight_is_that_of_a_stable_sort(alpha, dtype):
    """Many probabilities are equal here, as those of 16-bit logits are: their order decides what is in the tail."""
    student, teacher = (logits(200, 97, seed=seed, spread=2).round().to(dtype) for seed in (0, 1))
    log_p, log_q = log_probabilities(student, teacher, 1.0)
    p, order = log_p.exp().sort(dim=-1, stable=True)
    gap = (p - log_q.exp().gather(-1, order)).abs()
    head = gap * (p.cumsum(-1, dtype=torch.float64) > alpha)
    assert 0 < len(set(p[0].tolist())) < 20
    assert_close(adaptive_kl_weight(log_p, log_q, alpha), head.sum(-1) / gap.sum(-1))
    assert (adaptive_kl_weight(log_q, log_q, alpha) == 0.5).all()
