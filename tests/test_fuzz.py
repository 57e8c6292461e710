"""Whatever a user gives: a correct result or a clear error, never a traceback."""

import json
import os
import shlex
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import ROOT, run
from todi.data.records import load_records
from todi.errors import InputError
from todi.launch import evaluation_options
from todi.options import declared, parse
from todi.runtime.device import choose_device
from todi.settings import EvalConfig, GenerateConfig, TrainConfig
from todi.training.train_inputs import read_inputs

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
fields = st.dictionaries(st.sampled_from(["prompt", "output", "other"]), json_values | st.text(min_size=1) |
                         st.lists(st.text(min_size=1), min_size=1, max_size=3))
json_lines = fields.map(lambda value: json.dumps(value).encode())
cut_lines = st.tuples(json_lines, st.integers(0, 40)).map(lambda pair: pair[0][:pair[1]])
files = st.lists(json_lines | cut_lines | st.binary() | json_values.map(lambda value: json.dumps(value).encode()),
                 max_size=5)


@RELAXED
@given(lines=files)
def test_a_data_file(lines, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        records = load_records(path)
    except InputError as error:
        assert all(problem.startswith(str(path)) and "\n" not in problem for problem in error.problems)
    else:  # every line that is not blank has become a record, unaltered
        read = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        assert [record.prompt for record in records] == [line["prompt"] for line in read]
        assert [record.references[0] for record in records] == [
            line["output"] if isinstance(line["output"], str) else line["output"][0] for line in read]


flags = st.sampled_from([flag for config_type in (TrainConfig, EvalConfig, GenerateConfig)
                         for options in declared(config_type).values() for one in options for flag in one.flags])
words = st.lists(flags | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
                 | st.sampled_from(["ToDi", "auto", "lora", "bf16", "cosine", "beta=1", "=", "30m", "-1"]), max_size=8)


@RELAXED
@given(words=words)
@pytest.mark.parametrize("config_type", [TrainConfig, EvalConfig, GenerateConfig])
def test_a_command_line(config_type, words):
    try:
        config = parse(config_type, words)
    except InputError as error:
        assert error.problems
    except SystemExit as end:
        assert end.code == 0 and {"--help", "-h"} & set(words)
    else:
        assert all(isinstance(problem, str) for problem in config.problems())


numbers = st.integers(-2, 5).map(str) | st.floats(-1, 3).map(str)


@settings(RELAXED, max_examples=25)
@given(values=st.dictionaries(st.sampled_from(
    ["--kd-rate", "--kd-temperature", "--lr", "--batch-size", "--zero-stage", "--max-length", "--max-prompt-length",
     "--train-num", "--save-state-every", "--kd-objective", "--data-dir", "--peft-lora-r", "--deepspeed_config",
     "--teacher-peft-path", "--model-type"]), numbers | st.sampled_from(["", "/", "ToDi", "no such", "a/b/c", "."])))
def test_a_training_run_up_to_its_weights(values, workshop):
    model = str(workshop.model("gpt2-student", family="gpt2", hidden=32, seed=2))
    words = [f"{name}={value}" for name, value in ({
        "--model-path": model, "--teacher-model-path": model, "--data-dir": str(workshop.data)} | values).items()]
    try:
        inputs = read_inputs(parse(TrainConfig, words), choose_device(0))
    except InputError as error:
        assert all(error.problems)
    else:
        assert inputs.train and inputs.dev


@settings(RELAXED, max_examples=20)
@given(value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
@pytest.mark.parametrize("name", ["LR", "TEACHER_NAME", "SAVE_DIR", "MODEL_PATH"])
def test_a_launcher_hands_a_value_on_as_it_is(name, value):
    before = set(ROOT.iterdir())
    done = run("gpt2/vanilla_kd_gpt2_base", DRY_RUN=1, **{name: value})
    assert done.returncode == 0, done.stdout
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.stdout}"], capture_output=True).stdout
    assert any(value.encode() in word for word in words.split(b"\0"))
    assert set(ROOT.iterdir()) == before


@RELAXED
@given(value=st.text(st.sampled_from("ab '\"\\#$;=-/"), min_size=1, max_size=20))
def test_a_list_is_split_as_a_shell_does(value):
    try:
        words = ["--sets", *shlex.split(value)]
        if len(words) == 2 and words[1].startswith("-"):
            words = ["=".join(words)]  # it would be taken for an option
    except ValueError:
        with pytest.raises(InputError, match="^SETS: No "):
            evaluation_options([], {"SETS": value})
    else:
        if not os.path.exists(value):
            assert evaluation_options([], {"SETS": value}) == words
