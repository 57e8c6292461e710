"""What a teacher says besides by hidden states and a head: the mean of several, logits; as rows and as sources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from teachers import ALONE, CPU, teacher_spec_of
from todi.criterions import (
    DIVERGENCES,
    HeadRows,
    LinearHead,
    LogitRows,
    MeanRows,
    build_divergence,
    distillation_loss,
    linear_distillation_loss,
)
from todi.criterions import rows as row_module
from todi.data.batches import collate
from todi.errors import InputError
from todi.options import parse
from todi.settings import TrainConfig
from todi.teacher.callable import CallableTeacher, load_function
from todi.teacher.live import LiveTeacher
from todi.teacher.mean import MeanTeacher
from todi.teacher.opening import choose_caches, describe_choices, load_teacher, open_teachers
from torch.testing import assert_close

ROWS, VOCABULARY, INF, IGNORE = 7, 11, float("inf"), -100
ALL = slice(None)


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch):
    """The vocabularies here are so small that a chunk would be one block."""
    monkeypatch.setitem(row_module._BLOCK_BYTES, "cpu", 2 * 4 * VOCABULARY)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_rows(vocabulary: int = VOCABULARY, width: int = 4, seed: int = 1, softcap: float | None = None) -> HeadRows:
    head = LinearHead(draw(vocabulary, width, seed=seed), draw(vocabulary, seed=seed + 50), softcap=softcap)
    return HeadRows(draw(ROWS, width, seed=seed + 100), head)


@pytest.fixture
def student() -> tuple[torch.Tensor, LinearHead]:
    return (draw(ROWS, 3, seed=7).requires_grad_(),
            LinearHead(draw(VOCABULARY + 2, 3, seed=8).requires_grad_(), draw(VOCABULARY + 2, seed=9).requires_grad_()))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([IGNORE, 3, 1, IGNORE, 10, 0, 5])


def gradients(loss: torch.Tensor, student: tuple[torch.Tensor, LinearHead]) -> list[torch.Tensor]:
    hidden, head = student
    return list(torch.autograd.grad(loss, (hidden, head.weight, head.bias)))


def full_loss(student, probabilities: torch.Tensor, labels: torch.Tensor, divergence, temperature: float,
              kd_rate: float) -> torch.Tensor:
    """The loss from whole tensors by autograd: `probabilities` (N, V) are the teacher's, 0 where it says nothing."""
    hidden, head = student
    vocabulary, counts = probabilities.shape[1], labels != IGNORE
    logits = (hidden @ head.weight.T + head.bias)[counts, :vocabulary]
    ce = torch.nn.functional.cross_entropy(logits, labels[counts], reduction="sum")
    kd = divergence(logits, probabilities[counts].log() * temperature, temperature, labels[counts]).sum()
    return (1 - kd_rate) * ce + kd_rate * kd


class TestMean:
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.7)])
    def test_probabilities_are_averaged(self, weights, temperature):
        first, second = head_rows(VOCABULARY), head_rows(VOCABULARY + 4, width=6, seed=2, softcap=2.0)
        mean = MeanRows([first, second], weights)
        assert mean.vocabulary == VOCABULARY
        for vocabulary in (VOCABULARY, VOCABULARY - 3):
            p, q = (rows.head(rows.hidden)[:, :vocabulary].div(temperature).softmax(-1) for rows in (first, second))
            expected = (weights[0] * p + weights[1] * q) / sum(weights)
            found = mean.logits(slice(2, 5), vocabulary, temperature)
            assert_close((found / temperature).softmax(-1), expected[2:5])
            assert_close(found, expected[2:5].log() * temperature)  # a distribution already

    @pytest.mark.parametrize("name", list(DIVERGENCES))
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_loss_and_gradients(self, name, temperature, student, labels):
        first, second = head_rows(VOCABULARY + 1), head_rows(VOCABULARY, width=6, seed=2)
        p, q = (rows.head(rows.hidden)[:, :VOCABULARY].div(temperature).softmax(-1) for rows in (first, second))
        divergence = build_divergence(name)
        expected = full_loss(student, 0.75 * p + 0.25 * q, labels, divergence, temperature, 0.3)
        found = distillation_loss(*student, MeanRows([first, second], [3, 1]), labels, divergence=divergence,
                                  temperature=temperature, kd_rate=0.3, chunk_size=3)
        assert_close(found.loss, expected)
        assert_close(gradients(found.loss, student), gradients(expected, student))

    def test_one_teacher_twice_is_that_teacher(self, student, labels):
        rows, options = head_rows(), {"divergence": build_divergence("ToDi"), "temperature": 2.0, "chunk_size": 3}
        alone = linear_distillation_loss(*student, rows.hidden, rows.head, labels, **options)
        twice = distillation_loss(*student, MeanRows([rows, rows], [1, 5]), labels, **options)
        assert_close(tuple(twice), tuple(alone))
        assert_close(gradients(twice.loss, student), gradients(alone.loss, student))

    def test_an_entry_counts_as_far_as_one_teacher_gives_it(self):
        first, second = head_rows(softcap=2.0), head_rows(VOCABULARY + 2, seed=2)
        first.head.bias[[2, 4]] = second.head.bias[[4, 12]] = -INF
        mean = MeanRows([first, second], [1, 3])
        assert mean.masked.nonzero().flatten().tolist() == [4]
        p = mean.logits(ALL, VOCABULARY, 1.0).exp()
        q = second.head(second.hidden)[:, :VOCABULARY].softmax(-1)
        assert_close(p[:, 2], 0.75 * q[:, 2])
        assert not p[:, 4].any()
        assert_close(p.sum(-1), torch.ones(ROWS, dtype=torch.float64))
        assert MeanRows([first, head_rows()], [1, 1]).masked.sum() == 0
        assert MeanRows([first, LogitRows(draw(ROWS, VOCABULARY))], [1, 1]).masked is None

    def test_half_precision_teachers_are_averaged_in_float32(self):
        rows = head_rows()
        halved = HeadRows(rows.hidden.bfloat16(), LinearHead(rows.head.weight.bfloat16()))
        assert MeanRows([halved, halved], [1, 1]).logits(ALL, VOCABULARY, 2.0).dtype == torch.float32


class TestLogits:
    @pytest.mark.parametrize("name", list(DIVERGENCES))
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_unknown_entries_of_a_row_are_compared_in_neither_model(self, name, temperature, student, labels):
        """As `Divergence` itself does; the label of row 1 is one of them, and its cross-entropy stays."""
        values, divergence = draw(ROWS, VOCABULARY, seed=3), build_divergence(name)
        values[1, [3, 7]] = values[2, 5:] = values[6, 1:] = -INF
        found = distillation_loss(*student, LogitRows(values), labels, divergence=divergence, temperature=temperature,
                                  kd_rate=0.3, chunk_size=3)
        expected = full_loss(student, (values / temperature).softmax(-1), labels, divergence, temperature, 0.3)
        assert_close(found.loss, expected)
        assert_close(gradients(found.loss, student), gradients(expected, student))

    @pytest.mark.parametrize("name", list(DIVERGENCES))
    @pytest.mark.parametrize("garbage", [float("nan"), INF, -INF])
    def test_rows_without_a_label_may_hold_anything(self, name, garbage, student, labels):
        values, options = draw(ROWS, VOCABULARY, seed=3), {"divergence": build_divergence(name), "temperature": 2.0}
        dirty = values.clone()
        dirty[labels == IGNORE] = garbage
        clean = distillation_loss(*student, LogitRows(values), labels, **options)
        found = distillation_loss(*student, LogitRows(dirty), labels, **options)
        assert_close(tuple(found), tuple(clean))
        assert_close(gradients(found.loss, student), gradients(clean.loss, student))

    def test_a_row_of_which_nothing_is_known_is_finite(self, student, labels):
        values = torch.full((ROWS, VOCABULARY), -INF, dtype=torch.float64)
        found = distillation_loss(*student, LogitRows(values), labels, divergence=build_divergence("ToDi"), kd_rate=1)
        assert found.kd == 0
        assert not any(gradient.any() for gradient in gradients(found.loss, student))

    def test_they_are_what_a_head_makes_and_stay_as_they_are(self, student, labels):
        rows, options = head_rows(), {"divergence": build_divergence("ToDi"), "temperature": 2.0}
        rows.head.bias[4] = -INF
        values = rows.head(rows.hidden)
        kept = values.clone()
        found = distillation_loss(*student, LogitRows(values), labels, kd_rate=1, **options)
        wanted = linear_distillation_loss(*student, rows.hidden, rows.head, labels, kd_rate=1, **options)
        assert_close(found.kd, wanted.kd)
        assert_close(gradients(found.loss, student), gradients(wanted.loss, student))
        assert torch.equal(values, kept)

    def test_teacher_and_divergence_go_together(self, student, labels):
        for options in ({"teacher": LogitRows(draw(ROWS, VOCABULARY)), "divergence": None},
                        {"teacher": None, "divergence": build_divergence("ToDi")}):
            with pytest.raises(ValueError, match="teacher and divergence go together"):
                distillation_loss(*student, labels=labels, **options)


class TestSources:
    @pytest.fixture
    def specs(self, workshop):
        return [teacher_spec_of(workshop, family) for family in ("gpt2", "llama")]

    def test_each_is_live_or_cached_by_itself(self, specs, tmp_path):
        batch = collate([specs[0].examples[7]], 0)
        live = MeanTeacher([LiveTeacher(load_teacher(spec, CPU)) for spec in specs], [2, 1])
        options = {"passes": 3.0, "ranks": 1, "device": CPU}
        caches = choose_caches(specs, str(tmp_path / "caches"), earlier=None, **options)
        assert [cache.parent for cache in caches] == [tmp_path / "caches"] * 2
        for folders, said in ((caches, ["cached in fp32", "cached in fp32"]),
                              ([None, caches[1]], ["live", "cached in fp32"])):
            assert describe_choices(specs, folders) == said
            opened = open_teachers(specs, folders, [2, 1], ALONE, CPU)
            opened.expect([7])
            vocabulary = live.rows(batch).vocabulary
            assert_close(opened.rows(batch).logits(ALL, vocabulary, 2.0), live.rows(batch).logits(ALL, vocabulary, 2.0),
                         rtol=0, atol=1e-5)  # a cache is filled in batches
        assert choose_caches(specs, "auto", earlier=["live", "cached in fp32"], **options) == \
            [None, specs[1].shared_folder]

    def test_a_function_that_runs_the_model_says_the_same(self, specs):
        live, batch = LiveTeacher(load_teacher(specs[0], CPU)), collate(specs[0].examples[3:7], 0)
        vocabulary = live.rows(batch).vocabulary
        called = CallableTeacher(lambda batch: live.head(live.rows(batch).hidden), "f", vocabulary=300)
        expected = live.rows(batch).logits(ALL, vocabulary, 1.0)
        assert torch.equal(called.rows(batch).logits(ALL, vocabulary, 1.0), expected)
        assert len(called.rows(collate((), 0)).values) == 0

    @pytest.mark.parametrize(("answer", "said"), [
        (lambda n: torch.zeros(n + 1, 300), r"shape \(\d+, 300\); expected floating-point logits of shape \(\d+, V\)"),
        (lambda n: torch.zeros(n, 299), "shape .*V at least 300"),
        (lambda n: torch.zeros(n, 300, dtype=torch.long), "a tensor of torch.int64"),
        (lambda n: [[0.0] * 300] * n, "a list"),
        (lambda n: torch.full((n, 300), -torch.inf), r"(\d+) of \1 rows with -inf for each of the 300 entries"),
        (lambda n: torch.zeros(n, 310).index_fill_(1, torch.arange(300), -torch.inf), r"(\d+) of \1 rows with -inf"),
        (lambda n: torch.zeros(n, 300).index_fill_(0, torch.tensor([1]), -torch.inf), r"1 of \d+ rows with -inf")])
    def test_what_a_function_may_not_return(self, specs, answer, said):
        called = CallableTeacher(lambda batch: answer(len(batch.rows)), "mine.py:f", vocabulary=300)
        with pytest.raises(InputError, match=f"--teacher-callable: mine.py:f returned .*{said}"):
            called.rows(collate(specs[0].examples[:2], 0))

    def test_functions_that_there_are_not(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text("def logits(batch): pass\n")
        assert load_function(f"{file}:logits")(None) is None
        for place, said in ((f"{file}:logit", "has no function 'logit'; did you mean logits.*it has: logits"),
                            (f"{tmp_path}/none.py:f", "no such Python file: .*none.py"),
                            ("logits", "must have the form file.py:function, got 'logits'")):
            with pytest.raises(InputError, match=said):
                load_function(place)


class TestSettings:
    @pytest.mark.parametrize(("words", "said"), [
        (["--teacher-model-path", "a", "b", "--teacher-weights", "1", "2", "3"],
         "--teacher-weights needs one for each of --teacher-model-path, which has 2; got 1.0 2.0 3.0"),
        (["--teacher-model-path", "a", "b", "--teacher-peft-path", "c"], "--teacher-peft-path needs one for each"),
        (["--teacher-model-path", "a", "--teacher-weights", "inf"], "--teacher-weights must be finite, got inf"),
        (["--teacher-callable", "f.py:f", "--teacher-peft-path", "c"], "--teacher-model-path, which has 0; got c"),
        (["--teacher-model-path", "a", "--teacher-callable", "f.py:f"], "give one of them"),
        ([], "needs --teacher-model-path or --teacher-callable")])
    def test_what_does_not_fit(self, words, said):
        problems = parse(TrainConfig, ["--model-path", "m", *words]).problems()
        assert len(problems) == 1 and said in problems[0]

    def test_one_adapter_for_each(self):
        teacher = parse(TrainConfig, ["--teacher-model-path", "a", "b", "--teacher-peft-path", "none", "c"]).teacher
        assert teacher.adapters == (None, "c")


def train(folder: Path, *words: object) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "code"), "DS_ACCELERATOR": "cpu",
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    return subprocess.run([sys.executable, "-m", "todi.train", "--save-dir", str(folder), *map(str, words)], cwd=ROOT,
                          env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class TestRuns:
    @pytest.fixture(scope="class")
    def words(self, workshop) -> list[object]:
        student = workshop.model("cache-gpt2-student", family="gpt2", seed=2)
        return ["--model-path", student, "--data-dir", workshop.data, "--max-length", 64, "--max-prompt-length", 48,
                "--precision", "fp32", "--num-epochs", 1, "--max-steps", 2, "--log-interval", 1, "--no-eval-gen"]

    def test_two_teachers(self, workshop, words, tmp_path):
        teachers = [teacher_spec_of(workshop, family).path for family in ("gpt2", "llama")]
        done = train(tmp_path / "run", *words, "--teacher-model-path", *teachers, "--teacher-weights", 3, 1,
                     "--teacher-cache", tmp_path / "caches")
        assert done.returncode == 0, done.stdout
        assert "the teacher is the mean of 2, weighted 3 : 1" in done.stdout
        assert len(list((tmp_path / "caches").glob("*/cache.json"))) == 2
        deciding = json.loads((tmp_path / "run" / "args.json").read_text())["deciding"]
        assert deciding["teacher"] == ["cached in fp32", "cached in fp32"]
        card = next((tmp_path / "run").glob("epoch1*/README.md")).read_text()
        assert f"the mean of the teachers `{teachers[0]}` (weight 3), `{teachers[1]}` (weight 1) by ToDi" in card

    @pytest.mark.slow
    def test_a_function_trains_as_the_model_that_it_runs(self, workshop, words, tmp_path):
        teacher = teacher_spec_of(workshop).path
        (tmp_path / "mine.py").write_text(
            "import torch\n"
            "from todi.models.loading import load_model\n"
            "from todi.teacher.live import LiveTeacher\n"
            f"live = LiveTeacher(load_model({teacher!r}, torch.float32, torch.device('cpu')))\n"
            "def logits(batch):\n"
            "    rows = live.rows(batch)\n"
            "    return rows.head(rows.hidden)\n")
        place = f"{tmp_path / 'mine.py'}:logits"
        words = [*words, "--packing", "off"]  # as a function has it
        called = train(tmp_path / "called", *words, "--teacher-callable", place)
        live = train(tmp_path / "live", *words, "--teacher-model-path", teacher, "--teacher-cache", "off")
        assert (called.returncode, live.returncode) == (0, 0), called.stdout + live.stdout
        curves = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                  for name in ("called", "live")]
        assert curves[0] == curves[1] and len(curves[0]) == 3
        assert json.loads((tmp_path / "called" / "args.json").read_text())["deciding"]["teacher"] == "live"
        assert f"the teacher `{place}`" in next((tmp_path / "called").glob("epoch1*/README.md")).read_text()

    def test_a_function_that_is_not_there_is_refused(self, words, tmp_path):
        done = train(tmp_path / "run", *words, "--teacher-callable", "nowhere.py:logits")
        said = f"error: no such Python file: nowhere.py (looked for {ROOT}/nowhere.py)\n"
        assert (done.returncode, done.stdout) == (2, said)
        assert not (tmp_path / "run").exists()
