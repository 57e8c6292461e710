"""The chunked loss, values and gradients, against the full-logit reference in float64; its memory; its edges."""

import math
from types import SimpleNamespace

import pytest
import reference
import torch
from todi.criterions import (
    DIVERGENCES,
    DistillationCriterion,
    HeadRows,
    LinearHead,
    build_divergence,
    linear_distillation_loss,
)
from todi.criterions import linear as linear_module
from todi.criterions import rows as row_module
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

ROWS, VOCABULARY, INF, IGNORE = 8, 11, float("inf"), -100

every_divergence = pytest.mark.parametrize("name", list(DIVERGENCES))


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch):
    """The vocabularies here are so small that a chunk would be one block."""
    monkeypatch.setitem(row_module._BLOCK_BYTES, "cpu", 2 * 4 * VOCABULARY)


def make_case(rows=ROWS, hidden=5, vocabulary=VOCABULARY, teacher_vocabulary=None, bias=False, softcap=None, scale=1.0,
              dtype=torch.float64, seed=0) -> SimpleNamespace:
    """Random hidden states, heads and labels; every third row is masked, the teacher's hidden size is 2 more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    teacher_vocabulary = teacher_vocabulary or vocabulary
    case = SimpleNamespace(
        hidden=draw(rows, hidden).requires_grad_(), weight=draw(vocabulary, hidden).requires_grad_(),
        bias=draw(vocabulary).requires_grad_() if bias else None, softcap=softcap, scale=scale,
        teacher_hidden=draw(rows, hidden + 2), teacher_weight=draw(teacher_vocabulary, hidden + 2),
        teacher_bias=draw(teacher_vocabulary) if bias else None,
        labels=torch.randint(min(vocabulary, teacher_vocabulary), (rows,), generator=generator))
    case.labels[::3] = IGNORE
    return case


def ours(case, name="ToDi", params=None, **options):
    head = LinearHead(case.weight, case.bias, case.softcap, case.scale)
    if name is None:
        return linear_distillation_loss(case.hidden, head, None, None, case.labels, divergence=None, **options)
    teacher_head = LinearHead(case.teacher_weight, case.teacher_bias, case.softcap, case.scale)
    return linear_distillation_loss(case.hidden, head, case.teacher_hidden, teacher_head, case.labels,
                                    divergence=build_divergence(name, **params or {}), **options)


def expected(case, name="ToDi", params=None, chunk_size=None, **options):
    student = reference.head_logits(case.hidden, case.weight, case.bias, case.softcap, case.scale)
    teacher = name and reference.head_logits(case.teacher_hidden, case.teacher_weight, case.teacher_bias, case.softcap,
                                             case.scale)
    return reference.loss_sums(student, teacher, case.labels, name, params, **options)


def trained(case) -> list[torch.Tensor]:
    return [leaf for leaf in (case.hidden, case.weight, case.bias) if leaf is not None and leaf.requires_grad]


def gradients(loss, case) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, trained(case)))


def check(case, name="ToDi", params=None, **options):
    """All five sums and all gradients are those of the reference."""
    sums, wanted = ours(case, name, params, **options), expected(case, name, params, **options)
    for field, value in wanted.items():
        assert_close(getattr(sums, field), value.double(), msg=lambda text, field=field: f"{field}: {text}")
    assert_close(gradients(sums.loss, case), gradients(wanted["loss"], case))


class Made(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes; views make none."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if not func.is_view:
            self.shapes += [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence(name, temperature):
    check(make_case(bias=True), name, temperature=temperature, chunk_size=3)


@pytest.mark.parametrize("name, params", [("ToDi", {"beta": 2.5}), ("adaptive_kl", {"alpha": 0.2}),
                                          ("skewed_forward_kl", {"skew_lambda": 0.4}),
                                          ("skewed_reverse_kl", {"skew_lambda": 0.4})])
def test_parameters_reach_the_divergence(name, params):
    check(make_case(), name, params, chunk_size=3)


@pytest.mark.parametrize("shape", [(8, 5, 11), (13, 3, 17), (1, 1, 2)])
@pytest.mark.parametrize("chunk", [lambda n: 1, lambda n: 3, lambda n: max(1, n - 1), lambda n: n, lambda n: n + 7,
                                   lambda n: None], ids=["1", "3", "N-1", "N", "N+7", "default"])
def test_chunk_sizes(shape, chunk):
    case = make_case(*shape)
    case.labels[0] = 1
    check(case, chunk_size=chunk(shape[0]))


@pytest.mark.parametrize("kd_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixtures(kd_rate, label_smoothing, temperature):
    check(make_case(), chunk_size=3, kd_rate=kd_rate, label_smoothing=label_smoothing, temperature=temperature)


@pytest.mark.parametrize("head", [{"bias": True}, {"softcap": 2.0}, {"scale": 0.3}, {"teacher_vocabulary": 15},
                                  {"teacher_vocabulary": 7},
                                  {"bias": True, "softcap": 2.0, "scale": 0.3, "teacher_vocabulary": 7}], ids=str)
@pytest.mark.parametrize("name", ["ToDi", "js_divergence"])  # one with a closed form, one without
def test_heads(head, name):
    check(make_case(**head), name, chunk_size=3, temperature=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("name", ["ToDi", "sampled_reverse_kl"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_rows_with_temperatures_of_their_own(name, chunk_size):
    """Each row is that of a loss of its own, with the square of its temperature as a factor."""
    case, temperatures = make_case(bias=True, softcap=2.0), torch.linspace(0.5, 3, ROWS, dtype=torch.float64)
    found = ours(case, name, temperature=temperatures, kd_rate=1, chunk_size=chunk_size)
    expected = 0
    for row, temperature in enumerate(temperatures.tolist()):
        alone = SimpleNamespace(**{**vars(case), **{key: getattr(case, key)[[row]] for key in
                                                    ("hidden", "teacher_hidden", "labels")}})
        expected = expected + temperature ** 2 * ours(alone, name, temperature=temperature, kd_rate=1).loss
    assert_close((found.loss, found.kd), (expected, expected.detach()))
    assert_close(gradients(found.loss, case), gradients(expected, case))
    with torch.no_grad():
        assert_close(ours(case, name, temperature=temperatures, kd_rate=1).kd, found.kd)


def test_padding_of_either_vocabulary_gets_no_gradient():
    case = make_case(vocabulary=15, teacher_vocabulary=11, bias=True)
    _, d_weight, d_bias = gradients(ours(case).loss, case)
    assert d_weight[:11].any() and not d_weight[11:].any() and d_bias[:11].any() and not d_bias[11:].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_teacher_it_is_cross_entropy(label_smoothing):
    case = make_case(bias=True)
    sums = ours(case, name=None, chunk_size=3, kd_rate=0.7, label_smoothing=label_smoothing)
    wanted = functional.cross_entropy(functional.linear(case.hidden, case.weight, case.bias), case.labels,
                                      reduction="sum", label_smoothing=label_smoothing)
    assert_close((sums.loss, sums.ce, sums.kd), (wanted, wanted.detach(), torch.zeros_like(wanted)))
    assert_close(gradients(sums.loss, case), gradients(wanted, case))


def test_correct_counts_the_rows_whose_label_is_most_likely():
    case = make_case()
    best = (case.hidden @ case.weight.T).argmax(-1)
    case.labels = torch.where(torch.arange(ROWS) < 5, best, (best + 1) % VOCABULARY)
    case.labels[0] = IGNORE
    assert ours(case).correct == 4 and ours(case).tokens == 7


def test_sums_add_up():
    """Returning sums: 8 rows at once are 3 rows and then 5, in values and in gradients."""
    case = make_case()
    parts = [SimpleNamespace(**{**vars(case), **{key: getattr(case, key)[rows] for key in
                                                 ("hidden", "teacher_hidden", "labels")}})
             for rows in (slice(3), slice(3, None))]
    whole, (first, second) = ours(case), (ours(part) for part in parts)
    assert_close(tuple(whole), tuple(a + b for a, b in zip(first, second, strict=True)))
    assert_close(gradients(whole.loss, case), gradients(first.loss + second.loss, case))


def test_only_the_loss_has_a_gradient():
    sums = ours(make_case())
    assert [total.requires_grad for total in sums] == [True, False, False, False, False]
    assert all(total.shape == () for total in sums)


def test_frozen_head_costs_no_gradient():
    case = make_case(bias=True)
    wanted = gradients(ours(case).loss, case)

    def made():
        with Made() as tensors:
            found = gradients(ours(case, chunk_size=3).loss, case)
        return found, tensors.shapes

    assert case.weight.shape in made()[1]
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    found, shapes = made()
    assert case.weight.shape not in shapes
    assert_close(found, wanted[:1])
    ours(case).loss.backward()
    assert case.weight.grad is None and case.bias.grad is None


def test_frozen_hidden_states_leave_the_head_gradient_as_it_is():
    case = make_case(bias=True)
    whole = gradients(ours(case).loss, case)
    case.hidden.requires_grad_(False)
    assert_close(gradients(ours(case).loss, case), whole[1:])


def test_without_gradients_the_values_are_the_same():
    case = make_case()
    sums = ours(case)
    with torch.no_grad(), Made() as tensors:
        assert_close(tuple(ours(case, chunk_size=3)), tuple(total.detach() for total in sums))
    assert case.weight.shape not in tensors.shapes


def test_tied_head():
    """The head's weight is the embedding too: both gradients add up in one place."""
    case, tokens, mixing = make_case(), torch.randint(VOCABULARY, (ROWS,)), torch.randn(5, 5, dtype=torch.float64)
    found, wanted = [], []
    for loss, kept in ((lambda: ours(case, chunk_size=3).loss, found), (lambda: expected(case)["loss"], wanted)):
        case.hidden = functional.embedding(tokens, case.weight) @ mixing
        kept += torch.autograd.grad(loss(), case.weight)
    assert_close(found, wanted)


@every_divergence
@pytest.mark.parametrize("garbage", [float("nan"), INF])
def test_masked_rows_may_hold_anything(name, garbage):
    case = make_case(bias=True)
    clean = ours(case, name, chunk_size=3)
    masked = case.labels == IGNORE
    wanted = gradients(clean.loss, case)
    with torch.no_grad():
        case.hidden[masked] = garbage
        case.teacher_hidden[masked] = garbage
    dirty = ours(case, name, chunk_size=3)
    assert_close(tuple(dirty), tuple(clean))
    found = gradients(dirty.loss, case)
    assert_close(found, wanted)
    assert not found[0][masked].any()


@pytest.mark.parametrize("rows", [0, 5])
def test_no_labelled_row_is_zero_with_a_connected_graph(rows):
    case = make_case(rows=rows, bias=True)
    case.labels[:] = IGNORE
    sums = ours(case, chunk_size=3)
    assert all(total == 0 for total in sums)
    assert not any(gradient.any() for gradient in gradients(sums.loss, case))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    case = make_case()
    wanted = gradients(ours(case).loss, case)

    def layer_and_loss(hidden):
        return ours(SimpleNamespace(**{**vars(case), "hidden": hidden})).loss

    checkpoint(layer_and_loss, case.hidden, use_reentrant=use_reentrant).backward()
    assert_close([case.hidden.grad, case.weight.grad], wanted)


def test_autocast():
    """bfloat16 products, float32 softmax and sums, gradients in the precision of what they belong to."""
    case = make_case(dtype=torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        sums = ours(case, chunk_size=3)
    found = gradients(sums.loss, case)
    rounded = SimpleNamespace(**vars(case))
    for key in ("hidden", "weight", "bias"):
        setattr(rounded, key, getattr(case, key).detach().bfloat16().requires_grad_())
    same = ours(rounded, chunk_size=3)
    assert sums.loss == same.loss and sums.loss.dtype == torch.float32
    assert_close(found, [gradient.float() for gradient in gradients(same.loss, rounded)], rtol=0, atol=0)
    wanted = expected(rounded)
    assert_close(sums.loss.double(), wanted["loss"], rtol=0.02, atol=0)
    for gradient, wanted_gradient in zip(found, gradients(wanted["loss"], rounded), strict=True):
        assert_close(gradient, wanted_gradient.float(), rtol=0.05, atol=0.05)


def test_bfloat16_head_gathers_its_gradient_in_float32():
    """In bfloat16, a sum over many chunks would stop growing once a term is below 1/256 of it."""
    case = make_case(rows=450, hidden=1, vocabulary=2, dtype=torch.bfloat16)
    with torch.no_grad():
        case.hidden[:] = 1
        case.labels[:] = 1
    _, d_weight = gradients(ours(case, name=None, chunk_size=1).loss, case)
    _, wanted = gradients(expected(case, name=None)["loss"], case)
    assert d_weight.dtype == torch.bfloat16
    assert_close(d_weight.double(), wanted.double(), rtol=0.01, atol=0)


@every_divergence
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(name, scale):
    case = make_case(dtype=torch.float32, scale=scale)
    with torch.no_grad():
        case.hidden.sign_()
        case.weight.sign_()
    sums = ours(case, name, chunk_size=3)
    assert all(total.isfinite() for total in sums) and sums.kd >= 0
    assert all(gradient.isfinite().all() for gradient in gradients(sums.loss, case))


@every_divergence
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "temperature": 2.0}], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_masked_vocabulary(name, options, softcap):
    """Entries that a bias of -inf takes from either model: neither loss nor gradient knows of them."""
    case = make_case(bias=True, softcap=softcap)
    case.labels[case.labels >= 0] %= 4
    with torch.no_grad():
        case.bias[[5, 7]] = -INF
        case.teacher_bias[[7, 10]] = -INF
    check(case, name, chunk_size=3, **options)
    _, d_weight, d_bias = gradients(ours(case, name, **options).loss, case)
    assert not d_weight[[5, 7, 10]].any() and not d_bias[[5, 7, 10]].any()


def test_label_that_is_masked_is_finite_and_pulls_at_nothing_masked():
    case = make_case(bias=True, softcap=30.0, dtype=torch.float32)
    with torch.no_grad():
        case.bias[3] = -INF
    case.labels[:] = 3
    sums = ours(case)
    assert sums.loss.isfinite()
    found = gradients(sums.loss, case)
    assert all(gradient.isfinite().all() for gradient in found)
    assert not found[1][3].any() and found[2][3] == 0


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in reference.SHARPENING])
def test_a_student_that_is_its_teacher_is_exactly_zero_away(name):
    case = make_case(dtype=torch.float32, rows=30, hidden=7, vocabulary=101)
    case.teacher_hidden, case.teacher_weight = case.hidden.detach(), case.weight.detach()
    assert ours(case, name, temperature=2.0, chunk_size=7).kd == 0


def test_any_denominator_and_no_second_backward():
    case = make_case()
    loss = ours(case).loss / 7.3
    wanted = [gradient / 7.3 for gradient in gradients(expected(case)["loss"], case)]
    loss.backward(retain_graph=True)
    assert_close([case.hidden.grad, case.weight.grad], wanted)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    ours(case).loss.backward()  # a new forward adds to what is there
    assert_close(case.weight.grad, wanted[1] * (1 + 7.3))


@pytest.mark.parametrize("name", ["ToDi", "js_divergence", None])
def test_no_tensor_outgrows_a_chunk_or_the_head(name):
    rows, hidden, vocabulary, chunk = 64, 2, 301, 4
    case = make_case(rows, hidden, vocabulary, dtype=torch.float32)
    with Made() as tensors:
        ours(case, name, chunk_size=chunk).loss.backward()
    assert (chunk, vocabulary) in tensors.shapes and (vocabulary, hidden) in tensors.shapes
    assert max(math.prod(shape) for shape in tensors.shapes) <= chunk * vocabulary


def test_default_chunk_fits_the_budget_of_the_device():
    cpu = torch.device("cpu")
    for vocabulary in (50_257, 151_936, 262_144):
        size = linear_module.default_chunk_size(vocabulary, cpu)
        assert size * vocabulary * 4 <= 64 << 20 < (size + 1) * vocabulary * 4
    assert linear_module.default_chunk_size(10**9, cpu) == 1
    assert linear_module.default_chunk_size(50_257, torch.device("cuda")) > 1000


@pytest.mark.parametrize("option, value", [("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan")),
                                           ("kd_rate", -0.1), ("kd_rate", 1.1), ("label_smoothing", 1.0),
                                           ("label_smoothing", -0.1), ("chunk_size", 0)])
def test_option_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*got {value}"):
        ours(make_case(), **{option: value})


@pytest.mark.parametrize("missing", ["teacher_hidden", "teacher_head", "divergence"])
def test_teacher_and_divergence_go_together(missing):
    case = make_case()
    teacher = {"teacher_hidden": case.teacher_hidden, "teacher_head": LinearHead(case.teacher_weight),
               "divergence": build_divergence("ToDi")} | {missing: None}
    with pytest.raises(ValueError, match="go together"):
        linear_distillation_loss(case.hidden, LinearHead(case.weight), labels=case.labels, **teacher)


def test_criterion_hands_everything_on():
    case, options = make_case(), {"temperature": 2.0, "kd_rate": 0.3, "label_smoothing": 0.1, "chunk_size": 3}
    head, teacher = LinearHead(case.weight), HeadRows(case.teacher_hidden, LinearHead(case.teacher_weight))
    criterion = DistillationCriterion(build_divergence("js_divergence"), **options)
    assert_close(dict(criterion(case.hidden, head, case.labels, teacher)),
                 ours(case, "js_divergence", **options)._asdict())
    alone = ours(case, None)._asdict()
    del alone["kd"]
    assert_close(dict(DistillationCriterion()(case.hidden, head, case.labels, None)), alone)


@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 2.0, "scale": 0.3, "teacher_vocabulary": 7}], ids=str)
def test_rows_that_start_at_multiples_of_64(monkeypatch, head):
    """As on a GPU: the same numbers, laid out otherwise."""
    case = make_case(**head)
    wanted = ours(case, chunk_size=3)
    gradient = gradients(wanted.loss, case)
    monkeypatch.setattr("todi.criterions.linear_head._ALIGNED_DEVICES", {"cpu"})
    assert LinearHead(case.weight.detach()).rows(case.hidden.detach()).stride() == (64, 1)
    found = ours(case, chunk_size=3)
    assert_close((tuple(found), gradients(found.loss, case)), (tuple(wanted), gradient))
