"""A teacher whose weights lie over the ranks says what a whole one says."""

import json

import pytest
from launching import exhaustive, run, slow
from stopping import KD, TWO_RANKS
from test_library import run_program
from test_student_text import ON_POLICY
from todi.errors import InputError
from todi.options import from_keywords
from todi.settings import TrainConfig

MODELS = ("gpt2", "llama")  # a head that is the embedding, and one by itself


@pytest.fixture(scope="module")
def found(workshop, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("spread")
    teachers = {family: workshop.model(f"spread-{family}", family=family, hidden=48, seed=1) for family in MODELS}
    student = workshop.model("spread-student", seed=2)
    plan = {"teachers": teachers, "student": student, "data": workshop.data / "train.jsonl", "folder": folder}
    return run_program("spread_ranks", plan, folder, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_its_logits_are_those_of_a_whole_one(found, model, precision):
    for on_rank in found[f"{model} {precision}"]:
        assert on_rank["difference"] <= 1e-6
        assert on_rank["share"] == pytest.approx(0.5, abs=0.01)
        assert on_rank["packed"] == [True, True]
        assert on_rank["left"] == 0


@pytest.mark.slow
def test_ranks_with_other_shards_fill_the_same_cache(found):
    assert found["caches"]["shards"] == 3
    assert found["caches"]["difference"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("model", MODELS)
def test_a_student_learns_the_same_of_it(found, model, stage):
    for on_rank in found[f"{model} fp32"]:
        whole, cut = on_rank["losses"][stage]
        assert cut == pytest.approx(whole, rel=1e-6)
        assert len(set(cut)) == 3


@pytest.mark.parametrize("more", [slow({"ZERO_STAGE": 3}), exhaustive(ON_POLICY),
                                  exhaustive({"TEACHER_CACHE": "cache"})], ids=str)
def test_a_run_with_it_is_as_one_without(settings, tmp_path, more):
    settings = settings | TWO_RANKS | {"EPOCH": 1} | more
    found = []
    for mode in ("off", "on"):
        cache = {"TEACHER_CACHE": tmp_path / f"cache-{mode}"} if "TEACHER_CACHE" in more else {}
        done = run(KD, **settings | cache | {"TEACHER_ZERO": mode, "SAVE_DIR": tmp_path / mode})
        assert done.returncode == 0, done.stdout
        assert ("spread over the ranks" in done.stdout) == (mode == "on")
        lines = map(json.loads, (tmp_path / mode / "metrics.jsonl").read_text().splitlines())
        found.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found[0]) == 3


def test_a_function_cannot_be_spread():
    with pytest.raises(InputError, match="--teacher-zero on needs a --teacher-model-path"):
        from_keywords(TrainConfig, {"model_path": "m", "teacher_callable": "a.py:f", "teacher_zero": "on"})
