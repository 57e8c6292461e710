"""The command line: what is parsed, what is refused, and how it is said."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from reading import unread
from todi.criterions import DIVERGENCES
from todi.errors import InputError
from todi.options import check, declared, from_keywords, markdown_tables, option, parse, problems, spell
from todi.registry import Registry
from todi.settings import CacheConfig, EvalConfig, GenerateConfig, TrainConfig, named_numbers
from todi.settings.page import page
from todi.training.train_inputs import check_objective

CODE = Path(__file__).parents[1] / "code" / "todi"
SOURCES = {path: path.read_text() for path in CODE.rglob("*.py")}
DECLARATIONS = "\n".join(SOURCES.pop(path) for path in sorted((CODE / "settings").glob("*.py")))
# Declared, and to be read by what is not built yet.
NOT_YET: set[str] = set()

SHAPES: Registry[int] = Registry("shape")
SHAPES.add("round", 1)


@dataclass(frozen=True)
class PartConfig:
    """A group. With more to say."""

    share: float = option(0.5, "of all", above=0, at_most=1)
    level: int = option(2, "a few", least=0, at_most=3)
    ids: tuple[int, ...] = option((1, 2), "several", least=1)
    ratio: float | None = option(None, "of two", below=1)
    shape: str = option("round", "of a thing", choices=SHAPES)
    size: str = option("3m", "of a thing", pattern=(r"\d+m", "metres"), flag=("--size", "--length"))

    def rules(self) -> Iterator[str]:
        if self.share > self.level:
            yield "--share must not be above --level"


@dataclass(frozen=True)
class WholeConfig:
    """Of a test."""

    optim: PartConfig
    loud: bool = option(False, "or not")
    word: str = option("a", "one of two", choices=("a", "b"), env=("WORD", "OLD_WORD"), may_change=True)

    def rules(self) -> Iterator[str]:
        if self.loud and self.word == "a":
            yield "--loud needs --word b"


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
    (["--model-pth=x", "stray"], "unexpected argument 'stray'"),
    (["--data-dir", "x" * 300], "--data-dir: must have at most 255 bytes between slashes and 4095 in all, got 'xx"),
    (["--model-path", "x/" * 3000], "--model-path: must have at most 255 bytes"),
])
def test_words_that_are_no_options(words, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        parse(TrainConfig, words)


class TestPublishedOptions:
    """Those that mean nothing here are named with what to use, not with what is spelt like them."""

    @pytest.mark.parametrize(("config_type", "option", "said"), [
        (TrainConfig, "--adaptive-kl-alpha", "use --kd-params alpha=0.5"),
        (TrainConfig, "--skew-lambda", "use --kd-params skew_lambda=0.1"),
        (TrainConfig, "--lr-decay-style", "use --lr-scheduler"),
        (TrainConfig, "--top-k", "leave it out: dev responses are drawn from all tokens at temperature 1; "
                                 "python -m todi.evaluate has it"),
        (TrainConfig, "--task", "leave it out: the command is the task"),
        (EvalConfig, "--eval-batch-size", "use --batch-size"),
        (EvalConfig, "--seed", "use --seeds")])
    def test_what_to_use(self, config_type, option, said):
        for words in ([option, "1"], [f"{option}=1"]):
            with pytest.raises(InputError) as refused:
                parse(config_type, words)
            assert refused.value.problems == [f"unknown option {option}; {said}"]
        name = option[2:].replace("-", "_")
        with pytest.raises(InputError, match=re.escape(f"there is no setting {name}; {said}")):
            from_keywords(config_type, {name: 1})

    @pytest.mark.parametrize("config_type", [TrainConfig, EvalConfig])
    def test_what_is_named_is_there(self, config_type):
        flags = {flag for group in declared(config_type).values() for one in group for flag in one.flags}
        assert not flags & config_type.INSTEAD.keys()
        assert {flag for said in config_type.INSTEAD.values() for flag in re.findall(r"--[\w-]+", said)} <= flags


@pytest.mark.parametrize(("words", "said"), [
    (["--lr-scheduler", "cosin"], "--lr-scheduler must be constant, linear, cosine or noam, got 'cosin'"),
    (["--lr", "inf"], "--lr must be finite, got inf"),
    (["--save-state-every", "1h"], "--save-state-every must be a number of steps (500) or of minutes (30m), got '1h'"),
    (["--teacher-weights", "1", "-1"], "--teacher-weights must be above 0, got -1.0"),
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
    (["--seed", str(10**12)], "--seed must be in [0, 4294967296), got 1000000000000"),  # torch raises in an epoch
    (["--train-num", str(10**30)], f"--train-num must be a number of 64 bits, got {10**30}"),
    (["--gradient-accumulation-steps", str(10**9)], "a step of 1,000,000,000 micro-batches"),
    (["--global-batch-size", str(10**9), "--batch-size", "0"], "a step of 1,000,000,000 micro-batches"),
    (["--peft-lora-alpha", "0"], "--peft-lora-alpha must be in (0, 10000], got 0.0"),
    (["--save-dir", "/dev/null/run"], "--save-dir /dev/null/run: /dev/null is no folder"),
    (["--teacher-cache", "/dev/null"], "--teacher-cache /dev/null: /dev/null is no folder"),
])
def test_settings_out_of_range(words, said):
    found = parse(TrainConfig, ["--model-path", "m", *words]).problems()
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(("words", "said"), [
    (["--kd-objective", "TODY"], f"did you mean ToDi? allowed: {', '.join(DIVERGENCES)}"),
    (["--kd-params", "beta=-1"], "beta must be at least 0"),
    (["--kd-params", "gamma=1"], "ToDi has no parameter 'gamma'; allowed: beta"),
    (["--kd-params", "beta"], "expected name=number, got 'beta'"),
])
def test_objectives_that_there_are_not(words, said):
    with pytest.raises(InputError, match=re.escape(said)):
        objective = parse(TrainConfig, words).objective
        check_objective(objective.kd_objective, objective.kd_params, "--kd")


def test_all_problems_at_once():
    found = parse(TrainConfig, ["--kd-rate", "2", "--lr", "-1", "--zero-stage", "9"]).problems()
    assert len(found) == 5  # these three, no student, no teacher


class TestDeclarations:
    @pytest.mark.parametrize(("words", "said"), [
        ("--share 0", ["--share must be in (0, 1], got 0.0"]),
        ("--share inf", ["--share must be in (0, 1], got inf", "--share must not be above --level"]),
        ("--level 4", ["--level must be 0, 1, 2 or 3, got 4"]),
        ("--ids 3 0 -1", ["--ids must be at least 1, got 0", "--ids must be at least 1, got -1"]),
        ("--ratio 1", ["--ratio must be below 1, got 1.0"]),
        ("--ratio=-inf", ["--ratio must be finite, got -inf"]),
        ("--ratio nan", ["--ratio must be below 1, got nan"]),
        ("--shape ronud", ["--shape must be round, got 'ronud'"]),
        ("--size 3", ["--size must be metres, got '3'"]),
        ("--length 3", ["--size must be metres, got '3'"]),
        ("--level 0 --loud", ["--share must not be above --level", "--loud needs --word b"]),
        ("--shape ROUND --length 4m --ids", []),
    ])
    def test_what_is_wrong(self, words, said):
        config = parse(WholeConfig, words.split())
        assert problems(config) == said
        if said:
            with pytest.raises(InputError) as error:
                check(config)
            assert error.value.problems == said
        else:
            check(config)

    def test_a_word_is_refused_at_once_and_in_a_config_made_by_hand(self):
        with pytest.raises(InputError, match="--word: invalid choice: 'c'"):
            parse(WholeConfig, ["--word", "c"])
        assert problems(WholeConfig(PartConfig(), word="c")) == ["--word must be a or b, got 'c'"]

    def test_a_registry_is_asked_when_it_is_needed(self, monkeypatch):
        config = parse(WholeConfig, ["--shape", "square"])
        assert problems(config) == ["--shape must be round, got 'square'"]
        monkeypatch.setattr(SHAPES, "_entries", dict(SHAPES._entries))
        SHAPES.add("square", 2)
        assert problems(config) == []

    def test_an_older_flag_works_and_is_not_shown(self, capsys):
        assert parse(WholeConfig, ["--length", "7m"]).optim.size == "7m"
        with pytest.raises(SystemExit):
            parse(WholeConfig, ["--help"])
        assert "--size" in (shown := capsys.readouterr().out)
        assert "--length" not in shown

    @pytest.mark.parametrize("config_type", [TrainConfig, EvalConfig, GenerateConfig, CacheConfig])
    def test_the_defaults_are_allowed(self, config_type):
        for options in declared(config_type).values():
            for one in options:
                if one.flag.startswith("-"):
                    assert list(one.problems(one.default)) == [], one.name

    @pytest.mark.parametrize(("value", "text"), [(5e-4, "5e-4"), (1e-7, "1e-7"), (0.1, "0.1"), (2.0, "2.0"), (8, "8"),
                                                 (0.0, "0.0"), (("a", 3), "a 3"), (None, ""), (True, "yes")])
    def test_values_as_one_writes_them(self, value, text):
        assert spell(value) == text

    def test_a_name_is_one_setting(self):
        """Within a command: a variable or a flag that two options share would set both or neither."""
        for config_type in (TrainConfig, EvalConfig, GenerateConfig, CacheConfig):
            options = [one for group in declared(config_type).values() for one in group]
            for names in ([flag for one in options for flag in one.flags],
                          [variable for one in options for variable in one.variables]):
                assert len(names) == len(set(names))


class TestThePage:
    def test_it_is_up_to_date(self):
        made = (CODE.parents[1] / "docs" / "settings.md").read_text()
        assert made == page(), "python -m todi.settings > docs/settings.md"

    def test_a_table(self):
        assert markdown_tables(WholeConfig, ("variable", "option", "default", "allowed", "at resume", "meaning"),
                               leave_out=(PartConfig,)) == """### Of a test

| variable | option | default | allowed | at resume | meaning |
| --- | --- | --- | --- | --- | --- |
| `LOUD` | `--loud` | `no` | yes or no | with force | or not |
| `WORD` `OLD_WORD` | `--word` | `a` | a or b | may change | one of two |"""
        assert "| `--ids` | `1 2` | several, each at least 1 |" in markdown_tables(
            WholeConfig, ("option", "default", "allowed"))


class TestEveryOptionIsRead:
    @pytest.mark.parametrize(("config_type", "expected"), [(TrainConfig, NOT_YET), (EvalConfig, set()),
                                                             (GenerateConfig, set())])
    def test_somewhere(self, config_type, expected):
        assert unread(config_type, SOURCES.values(), DECLARATIONS) == expected

    def test_of_the_cache_command(self):
        found = unread(CacheConfig, SOURCES.values(), DECLARATIONS)
        assert not [name for name in found if name.startswith("CacheConfig")]

    @pytest.mark.parametrize("source", [
        "print(config.optim.share)", "def f(config: PartConfig): return config.share",
        "def f(*, part: 'PartConfig | None' = None): return lambda: part.share",
        "def f(config):\n    other, part = 1, config.optim\n    return part.share",
        "part = config.optim\nprint(part.share)", "part = parse(PartConfig)\npart.share", "self.optim.share.real"])
    def test_what_counts(self, source):
        assert unread(WholeConfig, [source], "") == UNREAD - {"PartConfig.share"}

    @pytest.mark.parametrize("source", [
        "print('.share')", "print(config.other.share)", "def f(config: OtherConfig): return config.share",
        "def f(part: PartConfig): pass\npart.share", "share = config.optim", "config.optim.shares",
        "part = config.optim\npart = other()\npart.share", "asdict(config)", "config.optim"])
    def test_what_does_not(self, source):
        assert unread(WholeConfig, [source], "") == UNREAD

    def test_a_property_counts_where_it_is_read_and_a_check_does_not(self):
        declarations = """class PartConfig:
    @property
    def big(self): return self.share > 1
    def rules(self): return self.level"""
        assert unread(WholeConfig, ["config.optim.big"], declarations) == UNREAD - {"PartConfig.share"}
        assert unread(WholeConfig, ["config.big"], declarations) == UNREAD

    def test_it_can_fail_for_each(self):
        """Without the reads of its name, whosever they are, every option is reported."""
        for group, options in declared(TrainConfig).items():
            for one in options:
                sources = [re.sub(rf"\.{one.name}\b", ".another", source) for source in SOURCES.values()
                           if f".{one.name}" in source]
                assert f"{group.__name__}.{one.name}" in unread(TrainConfig, sources, re.sub(
                    rf"self\.{one.name}\b", "self.another", DECLARATIONS))


UNREAD = {"PartConfig.share", "PartConfig.level", "PartConfig.ids", "PartConfig.ratio", "PartConfig.shape",
          "PartConfig.size", "WholeConfig.loud", "WholeConfig.word"}


def test_every_option_has_help():
    for config_type in (TrainConfig, EvalConfig, GenerateConfig, CacheConfig):
        assert all(one.help for options in declared(config_type).values() for one in options)


def test_kd_params():
    assert named_numbers(("beta=0.5", "alpha=1")) == {"beta": 0.5, "alpha": 1.0}


def test_help_needs_no_model():
    answer = subprocess.run([sys.executable, "-m", "todi.train", "--help"], capture_output=True, text=True,
                            env={"PYTHONPATH": str(CODE.parent), "PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu"})
    assert answer.returncode == 0
    assert "--kd-objective" in answer.stdout


def test_settings_are_made_without_torch():
    program = ("import sys; from todi.options import parse; from todi.settings import TrainConfig; "
               "parse(TrainConfig); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(CODE.parent)}).returncode == 0
