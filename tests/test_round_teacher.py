"""A teacher that reads the samples of a round once: what it answers, what it keeps, what it reads anew."""

import dataclasses
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from launching import exhaustive, run, slow
from stopping import KD, TWO_RANKS, finished, gone_on_with, killed_again_and_again, stopped
from teachers import ALONE, CPU, filled_by, flip
from test_student_text import ON_POLICY, told, without_speed
from todi.data.batches import collate
from todi.errors import InputError
from todi.options import from_keywords
from todi.settings import TrainConfig
from todi.teacher.cache_files import CorruptCache
from todi.teacher.live import LiveTeacher
from todi.teacher.mean import MeanTeacher
from todi.teacher.opening import load_teacher
from todi.teacher.rounds import RoundTeacher
from todi.train import _reads_rounds
from torch.testing import assert_close


@pytest.fixture
def texts(spec):
    """What a student wrote to the first prompts; their numbers are behind those of the data."""
    count = len(spec.examples)
    return [dataclasses.replace(example, ids=(*example.prompt, *range(20, 23 + number)), sample_id=count + number,
                                own=True) for number, example in enumerate(spec.examples[:7])]


@pytest.fixture
def model(spec):
    """The teacher; it counts the samples that it has read."""
    class Counting(LiveTeacher):
        read = 0

        def rows(self, batch):
            self.read += len(batch.counts)
            return super().rows(batch)

    return Counting(load_teacher(spec, CPU))


@pytest.fixture
def made(spec, model, tmp_path):
    return partial(RoundTeacher, spec, model, folder=tmp_path / "state/rounds/teacher1", world=ALONE, device=CPU)


def batch_of(spec, samples, packed=False):
    return collate(samples, spec.tokenizer.pad_token_id, packed)


def assert_as_live(teacher, model, spec, samples):
    for packed in (False, True):
        batch = batch_of(spec, samples, packed)
        found, expected = teacher.rows(batch), LiveTeacher.rows(model, batch)
        assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
        assert found.head is expected.head


def test_it_says_what_the_model_says(spec, model, made, texts):
    """Of the student's text and of the data's, in one batch, in any order; a filler has no rows."""
    teacher, samples = made(data=None), [texts[3], spec.examples[2], texts[0], spec.examples[0]]
    teacher.read(0, [*texts[:4], *spec.examples[:4], spec.examples[1]])  # of mixed data one may come twice
    assert model.read == 8
    assert_as_live(teacher, model, spec, samples)
    assert teacher.rows(batch_of(spec, [])).hidden.shape == (0, 48)


def test_the_data_comes_from_a_cache_where_there_is_one(spec, model, made, texts, tmp_path):
    teacher = made(data=filled_by(spec, tmp_path / "cache", batch_tokens=200))
    teacher.read(0, [*texts, *spec.examples])
    assert model.read == len(texts)
    teacher.expect([1, texts[2].sample_id])
    assert_as_live(teacher, model, spec, [texts[2], spec.examples[1], texts[6]])


def test_what_comes_again_is_not_read_again(spec, model, made, texts):
    teacher = made(data=None)
    teacher.read(0, texts[:4])
    teacher.read(8, texts[4:])
    before = teacher.rows(batch_of(spec, texts)).hidden
    again = made(data=None)  # a run that goes on
    again.read(0, texts[1:3])  # the others do not come again
    again.read(8, texts[4:])
    assert model.read == len(texts)
    batch = batch_of(spec, [texts[6], texts[1], texts[2]])
    assert torch.equal(again.rows(batch).hidden, teacher.rows(batch).hidden)
    assert len(before) == sum(text.response_tokens for text in texts)


@pytest.mark.parametrize("change", ["text", "teacher", "gone"])
def test_what_is_not_the_same_is_read_anew(spec, model, made, texts, change, tmp_path):
    made(data=None).read(0, texts[:4])
    again, now = made(data=None), list(texts[:4])
    if change == "text":  # of a step that was done again, from an earlier state
        now[2] = dataclasses.replace(now[2], ids=(*now[2].prompt, 30, 31))
    elif change == "teacher":
        again.spec = dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, name="bf16"))
    else:
        shutil.rmtree(tmp_path / "state/rounds/teacher1/round000000000/shard00000")
    again.read(0, now)
    assert model.read == 8
    assert_as_live(again, model, spec, now)


def test_damage_is_named(spec, made, texts, tmp_path):
    teacher = made(data=None)
    teacher.read(0, texts)
    flip(tmp_path / "state/rounds/teacher1/round000000000/shard00000/hidden.bin", 3)
    with pytest.raises(CorruptCache, match="round000000000.*fails its checksum"):
        teacher.rows(batch_of(spec, texts))


def test_it_forgets(spec, made, texts, tmp_path):
    teacher = made(data=None)
    for number in (0, 8, 16):
        teacher.read(number, texts[:2] if number < 16 else texts[2:])
    teacher.forget_before(8)
    assert sorted(path.name for path in (tmp_path / "state/rounds/teacher1").iterdir()) == ["round000000008",
                                                                                       "round000000016"]
    assert len(teacher.rows(batch_of(spec, texts)).hidden) == sum(text.response_tokens for text in texts)


def test_a_mean_of_several_has_each_of_them_read(spec, model, made, texts, tmp_path):
    teacher = MeanTeacher([made(data=None), RoundTeacher(spec, model, None, tmp_path / "state/rounds/teacher2", ALONE,
                                                         CPU)])
    teacher.read(0, texts)
    teacher.forget_before(0)
    assert model.read == 2 * len(texts)
    both = teacher.rows(batch_of(spec, texts)).teachers
    assert torch.equal(both[0].hidden, both[1].hidden)


@pytest.mark.parametrize(("given", "cached", "reads"), [
    ({"samples": "student"}, False, False),
    ({"samples": "student", "replay": 0.1}, False, True),
    ({"samples": "student", "replay": 0.1, "teacher_cache": "off"}, False, False),
    ({"samples": "student", "teacher_cache": "on"}, False, True),
    ({"samples": "adaptive"}, False, True),
    ({"samples": "mixed"}, False, False),
    ({"samples": "mixed"}, True, True),
    ({"samples": "dataset"}, True, False)])
def test_when_it_is_worth_while(given, cached, reads):
    settings = {"model_path": "m", "teacher_model_path": ["t"], "kd_rate": 1} | given
    job = SimpleNamespace(config=from_keywords(TrainConfig, settings), specs=["teacher"], terms={})
    assert _reads_rounds(job, ["cache" if cached else None]) == reads


# --- through a launcher

@pytest.mark.parametrize("more", [
    exhaustive({"TEACHER_CACHE": "on"}), slow({"SAMPLES": "paired", "TEACHER_CACHE": "on"}),
    exhaustive({"SAMPLES": "adaptive", "SAVE_STATE_EVERY": 1}), slow({"REPLAY": 0.6, "REPLAY_SIZE": 8, **TWO_RANKS}),
    exhaustive({"SAMPLES": "mixed", "TEACHER_CACHE": "on", "REPLAY": 0.6, "REPLAY_SIZE": 8})])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_by_bit(settings, tmp_path, more):
    settings = settings | ON_POLICY | {"ROUND_STEPS": 3} | more
    stopped(tmp_path / "stopped", settings)
    assert without_speed(gone_on_with(tmp_path / "stopped", settings)) == without_speed(
        finished(tmp_path / "whole", **settings))


@pytest.mark.slow
def test_kills_in_rounds_and_between_them(settings, tmp_path):
    settings = settings | ON_POLICY | {"SAMPLES": "mixed", "REPLAY": 0.5, "REPLAY_SIZE": 8, "TEACHER_CACHE": "on",
                                       "ROUND_STEPS": 3, "EPOCH": 30, "EVAL_INTERVAL": 5, "SAVE_STATE_EVERY": 1}
    killed = killed_again_and_again(tmp_path / "killed", 6, **settings)
    assert without_speed(killed) == without_speed(finished(tmp_path / "whole", **settings))


@pytest.mark.parametrize("more", [exhaustive({}), exhaustive({"SAMPLES": "mixed"}), exhaustive({"SAMPLES": "paired"}),
                                  slow({"SAMPLES": "mixed", **TWO_RANKS})])
def test_it_trains_as_a_live_teacher_does(settings, workshop, tmp_path, more):
    models = {variable: workshop.model(f"rounds-{variable}", family="llama", hidden=hidden, seed=hidden)
              for variable, hidden in (("MODEL_PATH", 32), ("TEACHER_MODEL_PATH", 48))}  # without dropout
    settings = settings | models | ON_POLICY | {"EPOCH": 2} | more
    live, read = (finished(tmp_path / mode, **settings | {"TEACHER_CACHE": mode}) for mode in ("off", "on"))
    losses = [[line["loss"] for line in told(outcome, "train")] for outcome in (live, read)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6


def test_what_is_read_when_is_said(settings, tmp_path):
    done = run(KD, **settings | ON_POLICY | {"EPOCH": 1, "SAVE_DIR": tmp_path, "SAMPLES": "paired",
                                             "TEACHER_CACHE": "on"})
    assert done.returncode == 0, done.stdout
    assert "teacher: read from " in done.stdout
    assert "teacher: reads what the student writes once, when a round begins" in done.stdout
    assert not (tmp_path / "state/rounds").exists()  # with the states, when the run has ended


def test_a_folder_needs_responses_of_the_data(tmp_path):
    with pytest.raises(InputError, match="--samples student uses no response of the data: --teacher-cache must be"):
        from_keywords(TrainConfig, {"model_path": "m", "teacher_model_path": ["t"], "samples": "student", "kd_rate": 1,
                                    "teacher_cache": str(tmp_path / "cache")})
