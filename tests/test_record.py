"""args.json: what makes two runs the same, and what a resumed run notices."""

import json

import pytest
import torch
from tiny import tiny_model
from todi.errors import InputError
from todi.options import parse
from todi.settings import TrainConfig
from todi.training.record import check_same_run, describe_run, differences, read_record
from todi.training.train_inputs import checksums, read_inputs


@pytest.fixture
def words(workshop, tmp_path) -> list[str]:
    """Options of a distillation whose teacher is the test's own."""
    student, model = workshop.model("record-student"), workshop.model("record-teacher", seed=1)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in model.iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    (tmp_path / "plugin.py").write_text("x = 1\n")
    return ["--model-path", str(student), "--teacher-model-path", str(teacher), "--data-dir", str(workshop.data),
            "--max-length", "64", "--max-prompt-length", "48", "--precision", "fp32", "--plugins",
            str(tmp_path / "plugin.py")]


def described(words: list[str], ranks: int = 1) -> dict:
    config = parse(TrainConfig, words)
    files = checksums(config, read_inputs(config, torch.device("cpu")))
    return json.loads(json.dumps(describe_run(config, ranks, files, "live")))


def test_the_same_run_has_no_difference(words):
    assert differences(described(words), described(words)) == []


def test_a_teacher_that_was_trained_again_at_the_same_path(words, tmp_path):
    before = described(words)
    vocabulary = json.loads((tmp_path / "teacher" / "config.json").read_text())["vocab_size"]
    tiny_model(tmp_path / "teacher", vocab=vocabulary, seed=2)
    assert differences(before, described(words)) == [f"{tmp_path}/teacher is not what it was"]


def test_a_plugin_that_was_edited(words, tmp_path):
    before = described(words)
    (tmp_path / "plugin.py").write_text("x = 2\n")
    assert differences(before, described(words)) == [f"{tmp_path}/plugin.py is not what it was"]


def test_settings_and_the_size_of_a_step(words):
    assert differences(described(words), described([*words, "--lr", "0.1", "--batch-size", "2"], ranks=3)) == [
        "lr was 0.0005, is 0.1", "samples of a step was 8, is 12"]


def test_what_may_change_does_not_count(words):
    assert differences(described(words), described([*words, "--log-interval", "3", "--report-to"])) == []


def test_a_run_of_version_0_1(words):
    """Files were known by name, some settings were no lists, and others were not there."""
    now = described(words)
    then = {"deciding": {**now["deciding"], "data_dir": now["deciding"]["data_dir"][0], "teacher_peft_path": None,
                         "train.jsonl": next(value for path, value in now["files"].items() if "train.jsonl" in path),
                         "dev.jsonl": "another"}}
    for name in ("loss_terms", "hidden_layers", "data_shares", "teacher_weights", "teacher_callable"):
        del then["deciding"][name]
    dev = next(path for path in now["files"] if path.endswith("dev.jsonl"))
    assert differences(then, now) == [f"{dev} is not what it was"]


def test_a_folder_of_another_run_is_refused(words, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(described(words)))
    check_same_run(tmp_path, described(words))
    with pytest.raises(InputError, match="holds a run that differs: seed was 10, is 11. Choose another --save-dir"):
        check_same_run(tmp_path, described([*words, "--seed", "11"]))


def test_what_no_run_wrote(tmp_path):
    assert read_record(tmp_path) is None
    (tmp_path / "args.json").write_text("[]")
    with pytest.raises(InputError, match="args.json is not of a run that can be gone on with"):
        read_record(tmp_path)
