"""args.json: what makes two runs the same, and what a resumed run notices."""

import json

import pytest
import torch
from tiny import tiny_model
from todi.errors import InputError
from todi.options import parse
from todi.settings import TrainConfig
from todi.training import record
from todi.training.record import check_same_run, describe_run, read_record, step_to_go_on_with
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
    inputs = read_inputs(config, torch.device("cpu"))
    return json.loads(json.dumps(describe_run(config, ranks, checksums(config, inputs), "live",
                                              sum(inputs.train_sizes), inputs.deepspeed_config)))


def differences(before: dict, now: dict) -> list[str]:
    return list(record.differences(before, now).values())


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
        "lr was 0.0005, is 0.1", "samples of a step was 8, is 12 (--global-batch-size 8 keeps it)"]


def test_what_may_change_does_not_count(words):
    assert differences(described(words), described([*words, "--log-interval", "3", "--report-to"])) == []
    spread = ["--zero-stage", "3", "--offload", "optimizer", "--batch-size", "1", "--global-batch-size", "8"]
    assert differences(described(words), described([*words, *spread], ranks=2)) == []


def test_what_earlier_versions_noted_and_may_change_now_does_not_count(words):
    before = described(words)
    before["deciding"] |= {"zero_stage": 3, "offload": ["param"], "global_batch_size": None}
    assert differences(before, described(words)) == []


@pytest.mark.parametrize(("change", "ranks", "samples"), [
    ([], 1, None), ([], 4, 8), (["--batch-size", "2"], 4, None), (["--gradient-accumulation-steps", "1"], 4, None),
    (["--global-batch-size", "12"], 4, None), (["--zero-stage", "3"], 2, 8)])
def test_steps_stay_as_they_are_where_only_the_devices_are_others(words, tmp_path, change, ranks, samples):
    (tmp_path / "args.json").write_text(json.dumps(described(words)))
    assert step_to_go_on_with(tmp_path, parse(TrainConfig, [*words, *change]).optim, ranks) == samples
    assert step_to_go_on_with(tmp_path / "nothing", parse(TrainConfig, words).optim, 2) is None


def test_a_precision_that_another_device_would_choose(words, monkeypatch):
    """The name of a run's folder says auto, on every device."""
    runs = []
    for has_bf16 in (False, True):
        monkeypatch.setattr("todi.runtime.device.cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        runs.append(described([*words, "--precision", "auto"]))
    assert any(line.startswith("bf16.enabled was") for line in differences(*runs))


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


def test_a_changed_deepspeed_file_is_noticed_wherever_it_lies(words, tmp_path):
    def with_file(name: str, content: str) -> dict:
        (tmp_path / name).write_text(content)
        return described([*words, "--deepspeed_config", str(tmp_path / name)])

    before = with_file("a.json", '{"zero_optimization": {"reduce_bucket_size": 1000}}')
    assert differences(before, with_file("b.json", '{"zero_optimization": {"reduce_bucket_size": 1e3}}')) == []
    assert differences(before, with_file("a.json", '{"zero_optimization": {"reduce_bucket_size": 2000}}')) == [
        "zero_optimization.reduce_bucket_size was 1000, is 2000"]
    assert differences(before, described(words)) == ["zero_optimization.reduce_bucket_size was 1000, is None"]


@pytest.mark.parametrize(("change", "goes_on"), [
    (["--lr", "0.1"], True), (["--clip-grad", "0.5"], True), (["--lr-scheduler", "linear"], True),
    (["--num-epochs", "3"], True), (["--kd-rate", "0.1"], True),
    (["--precision", "bf16"], False), (["--peft", "lora"], False), (["--seed", "1"], False),
    (["--batch-size", "2"], False), (["--train-num", "5"], False), (["--loss-terms", "hidden_states=1"], False)])
def test_what_force_can_and_cannot_change(words, tmp_path, change, goes_on, caplog):
    (tmp_path / "args.json").write_text(json.dumps(described(words)))
    changed = described([*words, *change])
    with pytest.raises(InputError, match="--resume force" if goes_on else r"removes that run\)$"):
        check_same_run(tmp_path, changed)
    if goes_on:
        check_same_run(tmp_path, changed, force=True)
        assert "going on though " + change[0][2:].replace("-", "_") in caplog.text
    else:
        with pytest.raises(InputError, match="cannot go on with what differs"):
            check_same_run(tmp_path, changed, force=True)


def test_force_does_not_take_up_the_state_of_another_student(words, tmp_path):
    before, path = described(words), words[1]
    before["deciding"]["model_path"] = "where it was"
    before["files"]["where it was"] = before["files"].pop(path)
    (tmp_path / "args.json").write_text(json.dumps(before))
    check_same_run(tmp_path, described(words), force=True)  # it was only moved
    before["files"]["where it was"] = "another"
    (tmp_path / "args.json").write_text(json.dumps(before))
    with pytest.raises(InputError, match="cannot go on with what differs: .* is not what .* was"):
        check_same_run(tmp_path, described(words), force=True)


def test_what_no_run_wrote(tmp_path):
    assert read_record(tmp_path) is None
    (tmp_path / "args.json").write_text("[]")
    with pytest.raises(InputError, match="args.json is not of a run that can be gone on with"):
        read_record(tmp_path)
