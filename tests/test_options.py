"""The command line: what is parsed, what is refused, and how it is said."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from todi.errors import InputError
from todi.options import parse
from todi.settings import TrainConfig, parse_kd_params
from todi.training.train_inputs import check_objective

CODE = Path(__file__).parents[1] / "code" / "todi"


def options_of(config_type):
    """(dataclass, field name) of every option."""
    for field in dataclasses.fields(config_type):
        part = typing.get_type_hints(config_type)[field.name]
        yield from ((part, option.name) for option in dataclasses.fields(part))


def test_defaults_are_the_published_ones():
    config = parse(TrainConfig, [])
    assert (config.optim.lr, config.optim.batch_size, config.optim.gradient_accumulation_steps) == (5e-4, 4, 2)
    assert (config.optim.num_epochs, config.optim.lr_min, config.optim.weight_decay) == (20, 1e-7, 0.01)
    objective, student = config.objective, config.student
    assert (objective.kd_objective, objective.kd_rate, objective.kd_temperature) == ("ToDi", 0.5, 2.0)
    assert (student.peft_lora_r, student.peft_lora_alpha, student.peft_lora_dropout) == (256, 8, 0.1)
    assert (config.data.max_length, config.data.max_prompt_length, config.run.seed) == (512, 256, 10)


def test_values_of_every_type():
    config = parse(TrainConfig, ["--model-path", "m", "--lr", "1e-3", "--max-steps", "7", "--no-eval-gen",
                                 "--kd-params", "beta=2", "--peft", "lora", "--deepspeed_config", "ds.json"])
    assert config.student.model_path == "m"
    assert config.optim.lr == 1e-3
    assert config.optim.max_steps == 7
    assert config.run.eval_gen is False
    assert config.objective.kd_params == ("beta=2",)
    assert config.student.peft == "lora"
    assert config.run.deepspeed_config == "ds.json"


@pytest.mark.parametrize(("words", "said"), [
    (["--model-pth", "x"], "unknown option --model-pth; did you mean --model-path?"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--peft", "qlora"], "invalid choice: 'qlora'"),
    (["stray"], "unexpected argument 'stray'"),
])
def test_words_that_are_no_options(words, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        parse(TrainConfig, words)


@pytest.mark.parametrize(("words", "said"), [
    (["--kd-rate", "1.5"], "--kd-rate must be in [0, 1], got 1.5"),
    (["--kd-temperature", "0"], "--kd-temperature must be above 0, got 0.0"),
    (["--kd-temperature", "nan"], "--kd-temperature must be above 0, got nan"),
    (["--max-prompt-length", "512"], "--max-prompt-length (512) must be below --max-length (512)"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--lr", "0"], "--lr must be above 0, got 0.0"),
    (["--zero-stage", "4"], "--zero-stage must be 0, 1, 2 or 3, got 4"),
    (["--peft-path", "a"], "--peft-path needs --peft lora"),
    (["--teacher-cache", "onn"], "--teacher-cache must be auto, on, off or a folder (as ./onn), got 'onn'"),
    (["--deepspeed_config", "nowhere.json"], "no such file: nowhere.json"),
    ([], "--criterion vanilla_kd needs --teacher-model-path"),
])
def test_settings_out_of_range(words, said):
    problems = parse(TrainConfig, ["--model-path", "m", *words]).problems()
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(("words", "said"), [
    (["--kd-objective", "TODY"], "did you mean ToDi? allowed: forward_kl, reverse_kl, js_divergence, tvd, "
                                 "skewed_forward_kl, skewed_reverse_kl, adaptive_kl, ToDi"),
    (["--kd-params", "beta=-1"], "beta must be at least 0"),
    (["--kd-params", "gamma=1"], "ToDi has no parameter 'gamma'; allowed: beta"),
    (["--kd-params", "beta"], "expected name=number, got 'beta'"),
])
def test_objectives_that_there_are_not(words, said):
    with pytest.raises(InputError, match=re.escape(said)):
        check_objective(parse(TrainConfig, words).objective)


def test_all_problems_at_once():
    problems = parse(TrainConfig, ["--kd-rate", "2", "--lr", "-1", "--zero-stage", "9"]).problems()
    assert len(problems) == 5  # these three, no student, no teacher


def test_every_option_is_read_somewhere():
    source = "\n".join(path.read_text() for path in CODE.rglob("*.py"))
    for part, name in options_of(TrainConfig):
        assert f".{name}" in source or f'"{name}"' in source, f"{part.__name__}.{name} is never read"


def test_every_option_has_help():
    for part, name in options_of(TrainConfig):
        assert part.__dataclass_fields__[name].metadata["help"]


def test_kd_params():
    assert parse_kd_params(("beta=0.5", "alpha=1")) == {"beta": 0.5, "alpha": 1.0}


def test_help_needs_no_model():
    answer = subprocess.run([sys.executable, "-m", "todi.train", "--help"], capture_output=True, text=True,
                            env={"PYTHONPATH": str(CODE.parent), "PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu"})
    assert answer.returncode == 0
    assert "--kd-objective" in answer.stdout
