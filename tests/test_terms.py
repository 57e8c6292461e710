"""Further terms of the loss: the maths of the hidden-state term, and what training makes of it."""

import re

import pytest
import torch
from launching import exhaustive, run, slow
from safetensors import safe_open
from stopping import gone_on_with, outcome, stopped
from todi.criterions import HeadRows, HiddenStates, LinearHead, ModelShape, TermContext, build_terms

KD = "gpt2/vanilla_kd_gpt2_base"


def rows_of(width: int, layers: int, seed: int) -> HeadRows:
    """Five rows of random layers in float64; the head is read by nobody."""
    generator = torch.Generator().manual_seed(seed)
    hidden = {layer: torch.randn(5, width, generator=generator, dtype=torch.float64).requires_grad_()
              for layer in range(1, layers + 1)}
    return HeadRows(hidden[layers], LinearHead(torch.zeros(3, width)), hidden)


class TestHiddenStates:
    def term(self, *pairs: tuple[int, int]) -> HiddenStates:
        torch.manual_seed(0)
        return HiddenStates(TermContext(ModelShape(3, 4), ModelShape(7, 6), pairs)).double()

    def test_its_value_and_gradients(self):
        term, student, teacher = self.term((1, 2), (3, 7)), rows_of(4, 3, 1), rows_of(6, 7, 2)
        value = term(student, teacher, torch.zeros(5))
        expected = 0
        for (ours, theirs), projection in zip(((1, 2), (3, 7)), term.projections, strict=True):
            for row in range(5):
                gap = projection.weight @ student.layers[ours][row] - teacher.layers[theirs][row]
                expected = expected + (gap @ gap) / 6 / 2
        torch.testing.assert_close(value, expected)
        leaves = [student.layers[1], student.layers[3], *term.parameters()]
        torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))

    def test_it_reads_the_layers_of_its_pairs(self):
        term = self.term((3, 7), (1, 2), (3, 2))
        assert (term.student_layers, term.teacher_layers) == ((1, 3), (2, 7))

    def test_without_pairs_the_layers_are_spread_evenly(self):
        assert self.term().pairs == ((1, 2), (2, 5), (3, 7))

    @pytest.mark.parametrize(("pairs", "teacher", "said"), [
        ([(4, 1)], ModelShape(7, 6), "no pair of layers 4:1; the student has 1 to 3, the teacher 1 to 7"),
        ([(1, 0)], ModelShape(7, 6), "no pair of layers 1:0"), ([], None, "needs one teacher that is a model")])
    def test_what_does_not_suit(self, pairs, teacher, said):
        with pytest.raises(ValueError, match=f"loss term hidden_states: .*{said}"):
            build_terms({"hidden_states": 1.0}, TermContext(ModelShape(3, 4), teacher, tuple(pairs)))

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match=re.escape("loss term 'hidden_state'; did you mean hidden_states?")):
            build_terms({"hidden_state": 1.0}, TermContext(ModelShape(3, 4), None))


@pytest.fixture(scope="session")
def with_term(settings) -> dict[str, object]:
    return settings | {"LOSS_TERMS": "hidden_states=0.5", "HIDDEN_LAYERS": "1:1 2:2"}


@pytest.mark.parametrize("shape", [
    slow({}), exhaustive({"NPROC": 2, "GRAD_ACC": 1, "ZERO_STAGE": 3}),
    exhaustive({"PEFT": "lora", "ZERO_STAGE": 2})], ids=str)
def test_it_is_trained_kept_at_resume_and_not_saved(with_term, tmp_path, shape):
    settings, folder = with_term | shape, tmp_path / "run"
    stopped(folder, settings)
    gone_on = gone_on_with(folder, settings)
    done = run(KD, **settings, SAVE_DIR=tmp_path / "whole")
    assert done.returncode == 0, done.stdout
    assert gone_on == outcome(tmp_path / "whole")
    lines = [line for line in gone_on["metrics"] if line["kind"] == "train"]
    assert lines[-1]["hidden_states"] < lines[0]["hidden_states"]
    for line in lines:
        assert line["loss"] == pytest.approx((line["ce"] + line["kd"] + line["hidden_states"]) / 2, rel=1e-5)
    weights, = folder.glob("epoch*/*.safetensors")
    with safe_open(weights, "pt") as saved:
        assert not [name for name in saved.keys() if "projection" in name or "terms" in name]  # noqa: SIM118


@pytest.mark.parametrize(("changed", "said"), [
    ({"TEACHER_CACHE": "on"}, "--teacher-cache on: a cache has the last hidden states only"),
    ({"HIDDEN_LAYERS": "1:9"}, "there is no pair of layers 1:9; the student has 1 to 2, the teacher 1 to 2"),
    ({"LOSS_TERMS": "", "HIDDEN_LAYERS": "1:1"}, "--hidden-layers needs --loss-terms"),
    ({"LOSS_TERMS": "kd=1"}, "unknown loss term 'kd'; allowed: hidden_states")])
def test_what_is_refused(with_term, tmp_path, changed, said):
    done = run(KD, **with_term | {"SAVE_DIR": tmp_path / "run"} | changed)
    assert (done.returncode, said in done.stdout) == (2, True), done.stdout
    assert not (tmp_path / "run").exists()
