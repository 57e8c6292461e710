"""Objectives of parts: how they are put together, what moves their parameters, and what training makes of them."""

import json
import math

import pytest
import torch
from launching import run
from stopping import TWO_RANKS, finished, gone_on_with, stopped
from todi.criterions import (
    DIVERGENCES,
    DistillationCriterion,
    Parameter,
    Term,
    build_divergence,
    linear_schedule,
    objective,
    row_weight,
    target,
)
from todi.criterions import parts as parts_module
from todi.criterions.kernels import choose_rows
from todi.criterions.rows import RowTask, eager_rows
from torch.testing import assert_close

KD = "gpt2/vanilla_kd_gpt2_base"
TEACHER, STUDENT = (torch.randn(5, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                    for seed in (0, 1))


@pytest.fixture(autouse=True)
def registries_restored(monkeypatch):
    """A test may register what it likes."""
    for registry in (DIVERGENCES, parts_module.TARGETS, parts_module.ROW_WEIGHTS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def two_terms():
    """What no preset is: two divergences, one of them from a target and with a weight, and a parameter of each."""
    @target("tempered", power=Parameter(0.5, least=0, help="of the teacher"))
    def tempered(log_p, log_q, *, power):
        return (power * log_p).log_softmax(-1)

    @row_weight("gap", scale=Parameter(2.0, least=0, help="of the weight"))
    def gap(log_p, log_q, *, scale):
        return scale * (log_p.exp() - log_q.exp()).abs().sum(-1)

    objective("mine", Term("ToDi"), Term("skewed_forward_kl", target="tempered", weight="gap"), help="Both.",
              schedule=linear_schedule("power", Parameter(1.0, help="at first"), Parameter(0.5, help="at last")),
              beta=Parameter(3.0, least=0, help="another default"))


def test_an_objective_of_two_terms(two_terms):
    mine = build_divergence("Mine", scale=1.5)
    assert mine.params == {"beta": 3.0, "skew_lambda": 0.1, "scale": 1.5, "power_start": 1.0, "power_end": 0.5}
    assert DIVERGENCES["mine"].help == "Both."
    student = STUDENT.clone().requires_grad_()
    p, q = TEACHER.softmax(-1), student.softmax(-1)
    weight = 1.5 * (p - q.detach()).abs().sum(-1)
    for moved, teacher in (({}, TEACHER), ({"power": 0.7}, 0.7 * TEACHER)):
        found = mine.at(moved or mine.moved)(student, TEACHER)
        expected = build_divergence("ToDi", beta=3)(student, TEACHER) + weight * build_divergence(
            "skewed_forward_kl")(student, teacher)
        assert_close(found, expected)
        wanted, = torch.autograd.grad(expected.sum(), student)
        assert_close(torch.autograd.grad(found.sum(), student)[0], wanted)
        log_p, log_q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
        assert_close(mine.at(moved or mine.moved).value_and_gradient(log_p, log_q), (expected.detach(), wanted))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Term("forward_kl", target="interpolate"), "unknown target 'interpolate'; did you mean interpolated"),
    (lambda: Term("forward_kl", weight="x"), "unknown row weight 'x'"),
    (lambda: Term("TAID"), "TAID has a schedule or a selection and can be no part"),
    (lambda: objective("x", Term("ToDi"), help="", alpha=Parameter(1, help="")),
     "no part of the objective x has a parameter alpha; there are beta"),
    (lambda: objective("x", Term("ToDi"), help="",
                       schedule=linear_schedule("t", Parameter(0, help=""), Parameter(1, help=""))),
     "no part of the objective x has a parameter t"),
    (lambda: objective("TAID", Term("ToDi"), help=""), "'TAID' is registered twice")])
def test_what_is_no_objective(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_linear_schedule():
    schedule = build_divergence("Veto", beta_start=1.0, beta_end=0.5).schedule(4)
    seen = []
    for _ in range(6):
        seen.append(schedule.values["beta"])
        schedule.advance(None)
    assert seen == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5] and not schedule.watches


def test_taids_schedule_is_its_recursion():
    schedule = build_divergence("TAID", t_rate=0.1, t_momentum=0.5).schedule(1000)
    losses, t, m = [2.0, 1.5, 1.6, 0.2, 0.0, 0.0], 0.4, 0.0
    for step, (before, now) in enumerate(zip([None, *losses], losses, strict=False), start=1):
        schedule.advance({"kd": now, "ce": 9.0})
        if before is not None:
            m = 0.5 * m + 0.5 * (before - now) / (before + 1e-15)
            t = min(1.0, max(0.4 + 0.6 * step / 1000, t + 0.1 / (1 + math.exp(-m)) * (1 - t)))
        assert schedule.values == {"t": pytest.approx(t)} and schedule.watches
    schedule.advance({"kd": 1.0})  # a fall of -1 over nothing
    assert math.isfinite(schedule.values["t"])


def test_taids_schedule_is_nearly_a_curve():
    """Where the loss falls slowly t is near 1 - (1 - t_start) exp(-rate n / 2), if that is ahead of the line."""
    schedule = build_divergence("TAID").schedule(10**6)
    for step in range(3000):
        schedule.advance({"kd": 2 * 0.9999 ** step})
    assert schedule.values["t"] == pytest.approx(1 - 0.6 * math.exp(-2.5e-4 * 2999), abs=1e-3)
    short = build_divergence("TAID").schedule(10)
    for step in range(10):
        short.advance({"kd": 2 * 0.9 ** step})
    assert short.values == {"t": 1.0}


def test_a_step_that_was_left_out_moves_taid_along_the_line_alone():
    schedule = build_divergence("TAID").schedule(10)
    for means in ({"kd": 2.0}, None, None):
        schedule.advance(means)
    assert schedule.values == {"t": pytest.approx(0.4 + 0.6 * 3 / 10)}
    assert schedule.state_dict() == {"step": 3, "t": schedule.t, "m": 0.0, "before": 2.0}


def test_the_share_follows_the_divergence():
    """AdaKD's: it stays for a while, falls with a falling divergence, rises with a rising one, and has its bounds."""
    made = build_divergence("AdaKD", share_rate=0.2, share_tolerance=0.1, share_momentum=0, share_wait=0.3,
                            share_least=0.6)
    schedule, seen = made.schedule(10), []
    assert made.numbers["share"] == 1 and schedule.watches
    for kd in (9, 8, 7, 2, 1.85, 1.75, None, 1.7, 0.5, 0.4, 0.5, 1, 2, 4):
        schedule.advance(None if kd is None else {"kd": kd, "ce": 9.0})
        seen.append(schedule.values["share"])
    # the divergence counts from the fourth step on, 2
    assert seen == pytest.approx([1, 1, 1, 1, 1, .8, .8, .8, .64, .6, .72, .864, 1, 1])
    assert schedule.state_dict() == {"step": 14, "share": 1.0, "mean": 4, "before": 4}


def test_the_share_goes_by_a_running_mean():
    schedule = build_divergence("AdaKD", share_momentum=0.9, share_wait=0).schedule(100)
    mean = before = 2.0
    share, seen = 1.0, []
    for step in range(40):
        kd = 2 * 0.95 ** min(step, 60 - 2 * step)  # falls for 20 steps, then rises twice as fast
        mean = 0.9 * mean + 0.1 * kd
        if abs(mean - before) > 0.05 * before:
            share, before = min(1.0, share * (1.05 if mean > before else 0.95)), mean
        schedule.advance({"kd": kd})
        seen.append(schedule.values["share"])
        assert seen[-1] == pytest.approx(share)
    assert min(seen) < 0.8 and max(seen[30:]) > 0.9


@pytest.mark.parametrize("name", ["TAID", "Veto", "ToDi_scheduled", "AdaKD"])
def test_a_schedule_goes_on_from_its_state(name):
    first, second = (build_divergence(name).schedule(20) for _ in range(2))
    for step in range(9):
        first.advance({"kd": 1 / (step + 1)})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(9, 12):
        for schedule in (first, second):
            schedule.advance({"kd": 1 / (step + 1)})
    assert first.values == second.values
    second.load_state_dict({})  # as of a state that has none
    assert first.values == second.values


def test_the_criterion_follows_its_schedule():
    criterion = DistillationCriterion(build_divergence("Veto"), 2.0, 0.7)
    assert criterion.schedule(10).values == criterion.divergence.moved == {"beta": 0.8}
    assert criterion.at({"beta": 0.1}).divergence.arguments == {"beta": 0.1}
    assert (criterion.at({"beta": 0.1}).kd_rate, criterion.divergence.moved) == (0.7, {"beta": 0.8})
    assert DistillationCriterion(build_divergence("ToDi")).schedule(10) is DistillationCriterion().schedule(10) is None


def test_what_does_not_know_a_part_is_eager_and_says_why(caplog, monkeypatch):
    monkeypatch.setattr("todi.criterions.kernels._chosen", {})
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which stands in for a GPU
    caplog.set_level("INFO", "todi")
    for name, kernels in (("TAID", "auto"), ("Veto", "compile")):
        for value in (0.1, 0.2):  # one choice and one line for all values of a schedule
            divergence = build_divergence(name).at({"t": value, "beta": value} if name == "TAID" else {"beta": value})
            task = RowTask(divergence, 1.0, 0.5, 0.0, None, 1.0, 11, None, False, torch.float32, torch.device("cpu"),
                           True)
            assert choose_rows(kernels, torch.float32, task) is eager_rows
    assert caplog.messages == [
        "loss: the eager row function (it has no kernel for the divergence TAID) for TAID, float32 on cpu",
        "loss: the eager row function (torch.compile would start anew with each value of the schedule) for Veto, "
        "float32 on cpu"]


@pytest.mark.parametrize(("name", "moved", "params"), [
    pytest.param("TAID", "kd_t", "t_rate=0.5", marks=pytest.mark.slow),
    pytest.param("Veto", "kd_beta", "beta_start=0.5", marks=pytest.mark.exhaustive)])
def test_a_schedule_is_kept_at_resume(settings, tmp_path, name, moved, params):
    settings = settings | {"KD_OBJ": name, "KD_PARAMS": params}
    stopped(tmp_path / "run", settings)
    whole = finished(tmp_path / "whole", **settings)
    assert gone_on_with(tmp_path / "run", settings) == whole
    assert len({line[moved] for line in whole["metrics"] if line["kind"] == "train"}) > 10


@pytest.mark.parametrize(("name", "params"), [
    pytest.param("TAID", "t_rate=0.5", marks=pytest.mark.exhaustive),
    pytest.param("SE_KD", "share=0.3", marks=pytest.mark.exhaustive),
    pytest.param("AdaKD", "share_momentum=0.5 share_rate=0.2 share_tolerance=0.01", marks=pytest.mark.slow)])
def test_nothing_depends_on_how_a_step_is_cut(workshop, name, params):
    models = {f"{role}_PATH": workshop.model(role, family="gpt2", hidden=hidden, seed=seed)
              for role, hidden, seed in (("TEACHER_MODEL", 48, 1), ("MODEL", 32, 2))}
    shapes = {"4x2": {}, "1x8": {"BATCH_SIZE": 1, "GRAD_ACC": 8}, "2 ranks": TWO_RANKS}
    runs = {shape: workshop.train(KD, f"{name} {shape}", KD_OBJ=name, KD_PARAMS=params, EPOCH=3, EVAL_GEN=0, **models,
                                  **cut) for shape, cut in shapes.items()}
    first, *others = ([{key: line[key] for key in ("kd", "loss", "kd_t") if key in line}
                       for line in run.result().metrics("train")] for run in runs.values())
    assert len({step["kd"] for step in first}) > 5 and ("kd_t" in first[0]) == (name == "TAID")
    for other in others:
        assert other == [pytest.approx(step, rel=1e-5) for step in first]


def test_what_is_refused(settings, tmp_path):
    done = run(KD, **settings | {"KD_OBJ": "TAID", "KD_PARAMS": "t=0.3", "SAVE_DIR": tmp_path / "run"})
    assert done.returncode == 2 and "TAID has no parameter 't'" in done.stdout
