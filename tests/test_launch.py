"""From the launchers' variables to options: values, names of models and runs, and variables that there are not."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import ROOT, run
from todi.elsewhere import handed_on
from todi.errors import InputError
from todi.finding import best_checkpoint
from todi.launch import evaluation_options, generation_options, read_values, training_options
from todi.options import Option, declared, option, parse
from todi.runtime.holders import BEAT, Holder
from todi.settings import EvalConfig, GenerateConfig, TrainConfig

GPT2 = {"FAMILY": "gpt2", "CKPT_NAME": "gpt2-base", "TEACHER_NAME": "gpt2-xlarge", "CRITERION": "vanilla_kd"}
# Made by version 0.1, but for the further settings at the end, which it left out.
RUN_NAMES = json.loads((Path(__file__).parent / "assets" / "run_names.json").read_text())


FOREIGN = """PATH HOME USER LANG LC_ALL SHELL PWD TERM TMPDIR TEMP TMP HOSTNAME EDITOR DISPLAY RANK WORLD_SIZE
    LOCAL_RANK GROUP_RANK CUDA_VISIBLE_DEVICES CUDA_HOME OMP_NUM_THREADS PYTHON PYTHONPATH VIRTUAL_ENV CONDA_PREFIX
    HF_HOME TORCH_HOME XDG_DATA_DIRS DS_ACCELERATOR SLURM_NNODES SLURM_NPROCS SLURM_GPUS SLURM_PROCID PBS_NODEFILE NGPUS
    NODES NODE_NAME WANDB_DIR WANDB_MODE TOKENIZERS_PARALLELISM LD_LIBRARY_PATH SEED_FILE epochs"""


@dataclass(frozen=True)
class OwnConfig:
    """Nothing but a declaration is needed for a variable."""

    paths: tuple[str, ...] = option((), "some", env=("PATHS", "OLD_PATHS"))


def train(*words: str, **variables: str) -> TrainConfig:
    return parse(TrainConfig, training_options(words, GPT2 | variables))


def evaluate(*words: str, **variables: str) -> EvalConfig:
    return parse(EvalConfig, evaluation_options(words, variables))


def generate(*words: str, **variables: str) -> GenerateConfig:
    return parse(GenerateConfig, generation_options(words, GPT2 | variables))


class TestValues:
    def test_what_is_not_said_is_as_declared(self):
        assert train() == parse(TrainConfig, [
            "--model-path", "model_hub/gpt2/gpt2-base", "--model-type", "gpt2", "--teacher-model-type", "gpt2",
            "--teacher-model-path", "outputs/gpt2/gpt2-xlarge/sft", "--save-dir", train().run.save_dir])

    def test_every_variable_reaches_its_option(self):
        """Every one alone, with a value that is not the default."""
        for config_type, compose, base in ((TrainConfig, training_options, GPT2 | {"SAVE_DIR": "x"}),
                                           (EvalConfig, evaluation_options, {}),
                                           (GenerateConfig, generation_options, GPT2)):
            for one in (one for options in declared(config_type).values() for one in options):
                for variable in one.variables:
                    text, value = other_value(one)
                    config = parse(config_type, compose([], base | {variable: text}))
                    assert found(config, one.name) == value, variable

    def test_empty_is_not_given(self):
        assert train(LR="", KD_PARAMS="", PEFT="", EVAL_GEN="") == train()

    def test_words_win(self):
        config = train("--lr=1e-3", "--eval-gen", "--num-epochs", "7", LR="fast", EPOCH="3", EVAL_GEN="0", SEED="4")
        assert (config.optim.lr, config.optim.num_epochs, config.run.eval_gen, config.run.seed) == (1e-3, 7, True, 4)
        assert evaluate("--data-dir", "there", SETS_DIR="here").sets_dir == "there"

    @pytest.mark.parametrize("words", [["--save-dir", "there"], ["--save-dir=there"],
                                       ["--save-dir", "a", "--kd-params", "beta=1", "--save-dir", "there"]])
    def test_the_folder_of_the_run_is_the_last_word(self, words):
        assert training_options(words, GPT2 | {"SAVE_DIR": "here"})[-2:] == ["--save-dir", "there"]
        assert training_options([], GPT2 | {"SAVE_DIR": "here"})[-2:] == ["--save-dir", "here"]

    def test_lists_are_split_as_in_a_shell(self):
        assert train(KD_PARAMS="a=1  'b=2 3'").objective.kd_params == ("a=1", "b=2 3")
        config = evaluate(SETS="dolly sinst/11_", SEEDS="1 2")
        assert (config.sets, config.seeds) == (("dolly", "sinst/11_"), (1, 2))
        assert len(train(KD_PARAMS="a=1 " * 200).objective.kd_params) == 200
        with pytest.raises(InputError, match=re.escape("SETS: No closing quotation, got \"it's\"")):
            evaluate(SETS="it's")

    def test_a_list_of_paths_may_be_one_with_spaces(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        paths = {one.name: one for one in declared(OwnConfig)[OwnConfig]}
        assert read_values(paths, {"OLD_PATHS": "my data"}) == {"paths": ["my", "data"]}
        (tmp_path / "my data").mkdir()
        assert read_values(paths, {"PATHS": "my data", "OLD_PATHS": "x"}) == {"paths": ["my data"]}

    def test_a_value_that_looks_like_an_option(self):
        assert train(DATA_DIR="--data", LR="-1").data.data_dir == ("--data",)

    @pytest.mark.parametrize(("text", "value"), [("1", True), ("0", False), ("true", True), ("False", False)])
    def test_yes_and_no(self, text, value):
        assert train(GRADIENT_CHECKPOINTING=text).student.gradient_checkpointing == value
        assert train(EVAL_GEN=text).run.eval_gen == value

    def test_neither_yes_nor_no(self):
        with pytest.raises(InputError, match="EVAL_GEN: must be 1, true, 0, false, got 'on'"):
            train(EVAL_GEN="on")

    def test_short_forms(self):
        assert train(SKEW_LAMBDA="0.2", KD_PARAMS="a=1").objective.kd_params == ("a=1", "skew_lambda=0.2")
        assert train(PEFT="full") == train()
        assert train(TEACHER_PEFT="lora", TEACHER_PEFT_PATH="none").teacher.teacher_peft_path == ()

    def test_sft_leaves_out_what_is_of_distillations(self):
        config = train(CRITERION="cross_entropy", KD_OBJ="tvd", TEACHER_MODEL_PATH="t", TEACHER_CACHE="on", LR="1e-3")
        assert (config.objective.kd_objective, config.teacher.teacher_model_path) == ("ToDi", ())
        assert (config.cache.teacher_cache, config.optim.lr) == ("auto", 1e-3)

    def test_an_older_name_counts_where_the_new_one_is_not_set(self):
        assert evaluate(DATA_DIR="old").sets_dir == "old"
        assert evaluate(DATA_DIR="old", SETS_DIR="new").sets_dir == "new"
        assert evaluate("--data-dir", "old").sets_dir == "old"


def other_value(one: Option) -> tuple[str, object]:
    """A text for a variable that is not the default, and what it means."""
    if one.type is bool:
        return str(int(not one.default)), not one.default
    if one.choices:
        text = next(word for word in one.choices if word != one.default)
    else:
        text = "0.25" if one.type is float else "77" if one.type is int else "x/y"
    return text, (one.type(text),) if one.many else one.type(text)


def found(config: object, name: str) -> object:
    """The option `name` of a config or of its groups."""
    parts = [config, *vars(config).values()]
    return next(vars(part)[name] for part in parts if name in getattr(part, "__dict__", {}))


class TestSweeps:
    """Runs that compute something else have folders of their own."""

    @pytest.mark.parametrize("variable", [
        "SKEW_LAMBDA=0.2", "KD_PARAMS=beta=2", "MAX_LENGTH=256", "DATA_DIR=data/mine", "LR_SCHEDULER=linear",
        "WARMUP_ITERS=5", "WEIGHT_DECAY=0.1", "TEACHER_MODEL_PATH=other", "LOSS_TERMS=hidden_states=1", "TRAIN_NUM=9",
        "TEACHER_DTYPE=bf16", "PLUGINS=a.py", "EVAL_GEN=0", "ADAM_EPS=1e-6", "MODEL_PATH=a/b"])
    def test_a_setting_is_in_the_name(self, variable):
        name, value = variable.split("=", 1)
        plain, changed = train().run.save_dir, train(**{name: value}).run.save_dir
        assert changed.startswith(f"{plain}__") and changed.count("/") == plain.count("/")

    def test_what_is_as_declared_or_may_change_is_not(self):
        assert train(MAX_LENGTH="512", LOG_INTERVAL="3", TEACHER_CACHE="on").run.save_dir == train().run.save_dir

    @pytest.mark.parametrize(("then", "now", "same"), [
        ({"NPROC": 2}, {"NPROC": 4}, True), ({"NPROC": 2, "ZERO_STAGE": 3}, {}, True),
        ({"NPROC": 2}, {"NPROC": 4, "GRAD_ACC": 1}, True), ({"NPROC": 2}, {"NPROC": 4, "BATCH_SIZE": 8}, False),
        ({"NPROC": 2}, {"NPROC": 2, "GLOBAL_BATCH_SIZE": 16, "BATCH_SIZE": 1, "OFFLOAD": "optimizer"}, True),
        ({"NPROC": 2}, {"NPROC": 2, "GLOBAL_BATCH_SIZE": 8}, False), ({"NPROC": 2}, {"NPROC": 4, "LR": "0.1"}, False),
        ({"NPROC": 2}, {"NPROC": 4, "MAX_LENGTH": 99}, False), ({"NPROC": 2}, {"NPROC": 4, "RESUME": "never"}, False)])
    def test_a_run_is_found_again_with_other_devices(self, then, now, same, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        then, now = ({name: str(value) for name, value in one.items()} for one in (then, now))
        before, named = train(**then).run.save_dir, train(**now).run.save_dir
        assert before != named
        (tmp_path / before / "state" / "epoch0_step2").mkdir(parents=True)
        assert train(**now).run.save_dir == (before if same else named)
        (tmp_path / before / "state" / "finished.json").touch()
        assert train(**now).run.save_dir == named

    def test_a_run_that_is_going_on_is_passed_over_for_one_at_rest(self, tmp_path, monkeypatch, capsys):
        """Alone it is named, and refused with its process and what begins another."""
        monkeypatch.chdir(tmp_path)
        going_on, at_rest = (Path(train(NPROC=devices).run.save_dir) for devices in "24")
        (going_on / "state/epoch0_step2").mkdir(parents=True)
        lock = tmp_path / going_on / ".lock"
        lock.write_text(json.dumps(vars(Holder.this_process())))
        assert train(NPROC="8").run.save_dir == str(going_on)
        (at_rest / "state/epoch0_step2").mkdir(parents=True)
        os.utime(at_rest / "state/epoch0_step2", (0.1, 0.1))  # it wrote long before
        assert train(NPROC="8").run.save_dir == str(at_rest)
        note = f"note: {going_on} is being written by process {os.getpid()} on "
        assert note in capsys.readouterr().err
        lock.write_text(json.dumps(vars(Holder.this_process()) | {"host": "elsewhere"}))
        assert train(NPROC="8").run.save_dir == str(at_rest)
        os.utime(lock, (time.time() - 2 * BEAT - 1,) * 2)  # its heart has missed a beat
        capsys.readouterr()
        assert train(NPROC="8").run.save_dir == str(going_on)
        assert note not in capsys.readouterr().err
        lock.unlink()
        assert train(NPROC="8").run.save_dir == str(going_on)

    def test_a_long_name_is_cut_and_stays_its_own(self):
        names = [Path(train(KD_PARAMS=f"{'é' * 100}=1 {'é' * 100}={i}").run.save_dir).name for i in range(2)]
        assert all(len(name.encode()) <= 255 for name in names)
        assert names[0] != names[1]


class TestPublishedNames:
    @pytest.mark.parametrize(("old", "new", "value"), [
        ("CKPT_PATH", "MODEL_PATH", "m"), ("SAVE_PATH", "SAVE_DIR", "s"), ("CKPT_TYPE", "MODEL_TYPE", "olmo2"),
        ("TEACHER_MODEL_NAME", "TEACHER_NAME", "gpt2-large"), ("GPUS_PER_NODE", "NPROC", "2")])
    def test_they_count_where_ours_are_not_set(self, old, new, value):
        assert dry_run(**{old: value}) == dry_run(**{new: value}) != dry_run()
        assert dry_run(**{old: value, new: "4"}) == dry_run(**{new: "4"})

    def test_those_without_a_meaning_are_named(self):
        output = dry_run(WORK_DIR="/x", OPTS="--y")
        assert "note: WORK_DIR, of the published scripts, is not used here: paths start at the root" in output
        assert "note: OPTS, of the published scripts, is not used here: words after the launcher's name" in output

    def test_another_criterion_than_the_launchers(self):
        done = run("gpt2/vanilla_kd_gpt2_base", DRY_RUN=1, CRITERION="cross_entropy")
        assert done.returncode == 2
        assert "error: this launcher trains with CRITERION=vanilla_kd, got cross_entropy" in done.stdout


def dry_run(**variables: object) -> str:
    done = run("gpt2/vanilla_kd_gpt2_base", DRY_RUN=1, **variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


class TestDevices:
    """On a machine with four GPUs, which a small nvidia-smi plays."""

    @pytest.fixture
    def processes(self, tmp_path, monkeypatch):
        smi = tmp_path / "nvidia-smi"
        smi.write_text('#!/bin/sh\nif [ "$1" = -L ]; then echo GPU 0; else printf "0\\n1\\n2\\n3\\n"; fi\n')
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

        def count(**variables: str) -> int:
            output = dry_run(**{"GPUS": ""} | variables)
            return int((re.search(r"nproc-per-node (\d+)", output) or [0, 1])[1])
        return count

    @pytest.mark.parametrize(("variables", "expected"), [
        ({}, 4), ({"GPUS": "0,1"}, 2), ({"GPUS": "0 1 2"}, 3), ({"GPUS": "(0 1 2 3)"}, 4), ({"GPUS": "cpu"}, 1),
        ({"GPUS": " CPU "}, 1), ({"GPUS": "none"}, 1), ({"GPUS": "cpu", "NPROC": "2"}, 2),
        *(({"CUDA_VISIBLE_DEVICES": value}, count) for value, count in [
            ("", 1), ("-1", 1), ("NoDevFiles", 1), ("0,-1,1", 1), ("GPU-8932f937,GPU-1234", 2), ("MIG-1c2d", 1),
            ("0,1,", 2), (" 1", 1), ("2,3", 2)])])
    def test_how_many(self, processes, variables, expected):
        assert processes(**variables) == expected

    def test_a_published_launchers_array(self, tmp_path):
        own = tmp_path / "own.sh"
        own.write_text(f'GPUS=(0 1 2)\nsource "{ROOT}/scripts/lib/common.sh"\nchoose_devices\necho "$NPROC"\n')
        assert subprocess.run(["bash", own], capture_output=True, text=True).stdout == "3\n"


@pytest.mark.parametrize(("launcher", "expected"), [
    ("tinyllama/vanilla_kd_tinyllama", True), ("tinyllama/sft_teacher_llama2", True),
    ("tinyllama/sft_tinyllama", False), ("gpt2/vanilla_kd_gpt2_base", False)])
def test_gradient_checkpointing_where_it_was_published(launcher, expected):
    done = run(launcher, DRY_RUN=1)
    assert ("--gradient-checkpointing" in shlex.split(done.stdout)) == expected, done.stdout


class TestModels:
    def test_the_teacher_is_the_best_of_its_newest_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        runs = tmp_path / "outputs/gpt2/gpt2-xlarge/sft"
        make_run(runs / "old", 1000, "epoch1_step3_loss1.0000_rougel99.0")
        make_run(runs / "new run", 2000, "epoch1_step3_loss2.0_rougel9.5", "epoch2_step6_loss3.0_rougel10.2", "state",
                 "epoch3_step9_loss1.0_rougel8.0", ".epoch4_step9_loss1.0_rougel80.0.unfinished")
        best = "outputs/gpt2/gpt2-xlarge/sft/new run/epoch2_step6_loss3.0_rougel10.2"
        assert train().teacher.teacher_model_path == (best,)
        teacher = train(TEACHER_PEFT="lora").teacher
        assert (teacher.teacher_model_path, teacher.teacher_peft_path) == (("model_hub/gpt2/gpt2-xlarge",), (best,))
        assert train(TEACHER_MODEL_PATH="mine").teacher.teacher_model_path == ("mine",)
        assert train(TEACHER_MODEL_PATH="mine 'other one'").teacher.teacher_model_path == ("mine", "other one")

    def test_scoring_an_older_run_does_not_make_it_the_teacher(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        runs = tmp_path / "outputs/gpt2/gpt2-xlarge/sft"
        for second, name in enumerate(("a newer run", "an older run")):
            checkpoint = runs / name / "epoch1_step3_loss2.0000_rougel9.0000"
            checkpoint.mkdir(parents=True)
            (checkpoint / "model.safetensors").touch()
            os.utime(checkpoint / "model.safetensors", (2000 - second, 2000 - second))
        (checkpoint / "eval").mkdir()
        (checkpoint.parent / "notes").touch()
        best = "outputs/gpt2/gpt2-xlarge/sft/a newer run/epoch1_step3_loss2.0000_rougel9.0000"
        assert train().teacher.teacher_model_path == (best,)

    @pytest.mark.parametrize(("names", "best"), [
        (["epoch1_step3_loss2.5", "epoch2_step6_loss12.1", "epoch3_step9_loss2.1"], 2),
        (["epoch1_step3_loss2.5", "epoch2_step6_lossnan"], 0),
        (["epoch1_step3_loss2.5_rougel7.0", "epoch2_step6_loss2.6_rougel7.0"], 0),  # in the order of a run itself
        (["epoch1_step9_loss2.5_rougel7.0", "epoch2_step10_loss2.5_rougel7.0"], 1),
        (["epoch1_step3_loss2.5_rougelnan", "epoch2_step6_loss2.6_rougel0.0"], 1),
        (["epoch1_step3_loss2.5_rougelnan", "epoch2_step6_lossnan_rougelnan"], 0),
        (["epoch1_step3_loss0.5", "epoch2_step6_loss2.6_rougel1.0"], 1),
    ])
    def test_which_is_best(self, tmp_path, names, best):
        make_run(tmp_path / "run", 1000, *names)
        assert best_checkpoint(tmp_path) == str(tmp_path / "run" / names[best])

    def test_a_family_of_its_own(self):
        config = train(TEACHER_FAMILY="llama2", TEACHER_PEFT="lora")
        assert config.teacher.teacher_model_type == "llama2"
        assert config.teacher.teacher_model_path == ("model_hub/llama2/gpt2-xlarge",)
        assert config.teacher.teacher_peft_path == ("outputs/llama2/gpt2-xlarge/sft",)
        with pytest.raises(InputError, match="TEACHER_PEFT must be lora or full, got 'lore'"):
            train(TEACHER_PEFT="lore")

    @pytest.mark.parametrize(("there", "asked"), [("llama2-7b", "llama2-7b-hf"), ("llama2-7b-hf", "llama2-7b"),
                                                  ("llama2-7b-hf", "llama2-7b-hf")])
    def test_published_names_of_folders_and_ours_find_each_other(self, tmp_path, monkeypatch, there, asked):
        monkeypatch.chdir(tmp_path)
        tuned = f"outputs/llama2/{there}/sft/run/epoch1_step3_loss2.0_rougel9.5"
        for folder in (f"model_hub/llama2/{there}", "model_hub/tinyllama/tinyllama-1.1b-3T", tuned):
            (tmp_path / folder).mkdir(parents=True)
        config = train(FAMILY="tinyllama", CKPT_NAME="tinyllama-1.1b", TEACHER_FAMILY="llama2", TEACHER_NAME=asked,
                       TEACHER_PEFT="lora")
        assert config.student.model_path == "model_hub/tinyllama/tinyllama-1.1b-3T"
        assert config.teacher.teacher_model_path == (f"model_hub/llama2/{there}",)
        assert config.teacher.teacher_peft_path == (tuned,)
        assert "outputs/tinyllama/tinyllama-1.1b/" in config.run.save_dir  # a run goes by the name that was asked for
        (tmp_path / "model_hub/tinyllama/tinyllama-1.1b").mkdir()
        assert train(FAMILY="tinyllama", CKPT_NAME="tinyllama-1.1b").student.model_path.endswith("/tinyllama-1.1b")

    def test_names_of_what_is_not_there_stay_as_they_are(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("tinyllama-1.1b", "tinyllama-1.1b-3T", "other"):
            assert train(FAMILY="tinyllama", CKPT_NAME=name).student.model_path == f"model_hub/tinyllama/{name}"

    def test_a_callable_is_instead_of_a_model(self):
        teacher = train(TEACHER_CALLABLE="mine.py:logits", TEACHER_PEFT="lora").teacher
        assert (teacher.teacher_model_path, teacher.teacher_peft_path) == ((), ())

    def test_a_run_needs_names(self):
        with pytest.raises(InputError, match="set TEACHER_NAME or SAVE_DIR"):
            training_options([], {"FAMILY": "gpt2", "CKPT_NAME": "base", "CRITERION": "vanilla_kd"})
        with pytest.raises(InputError, match="NPROC must be a whole number of at least 1, got 'two'"):
            train(NPROC="two")
        assert training_options([], {"MODEL_PATH": "m", "SAVE_DIR": "d"}) == ["--model-path", "m", "--save-dir", "d"]


class TestTeacherText:
    def test_the_teacher_writes_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_run(tmp_path / "outputs/gpt2/gpt2-xlarge/sft/run", 1000, "epoch1_step3_loss1.0000")
        best = "outputs/gpt2/gpt2-xlarge/sft/run/epoch1_step3_loss1.0000"
        config = generate(MODEL_PATH="student", PEFT_PATH="students")
        assert (config.model_path, config.peft_path) == (best, None)
        config = generate(TEACHER_PEFT="lora")
        assert (config.model_path, config.peft_path) == ("model_hub/gpt2/gpt2-xlarge", best)
        assert generate(TEACHER_PEFT="lora", TEACHER_PEFT_PATH="none").peft_path is None
        assert generate(TEACHER_MODEL_PATH="mine", TEACHER_PEFT_PATH="a").peft_path == "a"
        assert generate(TEACHER_DTYPE="bf16", PRECISION="fp32").precision == "bf16"

    @pytest.mark.parametrize(("variables", "folder"), [
        ({}, "data/dolly-by-gpt2-xlarge"), ({"DATA_DIR": "there/a there/b"}, "there/a+b-by-gpt2-xlarge"),
        ({"TEXT_DIR": "mine"}, "mine"), ({"SAVE_DIR": "of the student"}, "data/dolly-by-gpt2-xlarge"),
        ({"TEACHER_NAME": "a/b"}, "data/dolly-by-a-b")])
    def test_its_folder(self, variables, folder):
        assert generate(**variables).save_dir == folder
        assert generation_options([], GPT2 | variables)[-2:] == ["--save-dir", folder]

    @pytest.mark.parametrize(("variables", "said"), [
        ({"TEACHER_NAME": ""}, "text is written by one model: set TEACHER_NAME or TEACHER_MODEL_PATH"),
        ({"TEACHER_NAME": "", "TEACHER_MODEL_PATH": "m"}, "set TEACHER_NAME or TEXT_DIR"),
        ({"TEACHER_MODEL_PATH": "a b"}, "text is written by one model"),
        ({"TEACHER_CALLABLE": "a.py:f"}, "text is written by one model")])
    def test_who_cannot_write(self, variables, said):
        with pytest.raises(InputError, match=said):
            generate(**variables)


def make_run(folder: Path, seconds: int, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (seconds, seconds))


class TestNames:
    @pytest.mark.parametrize("case", RUN_NAMES, ids=lambda case: f"{case['launcher']} {case['variables']}")
    def test_a_run_is_found_where_it_has_always_been(self, case):
        done = run(case["launcher"], DRY_RUN=1, **case["variables"])
        assert done.returncode == 0, done.stdout
        assert shlex.split(done.stdout)[-1] == case["save_dir"]

    def test_an_evaluation_is_told_by_words(self):
        config = evaluate("--model-path", "here", MODEL_PATH="there", PEFT_PATH="a", SAVE_DIR="b", BATCH_SIZE="3")
        assert (config.model_path, config.peft_path, config.save_dir, config.batch_size) == ("here", None, None, 0)


class TestUnknownVariables:
    @pytest.mark.parametrize(("name", "meant"), [
        ("EPOCHS", "EPOCH"), ("KD_OBJECTIVE", "KD_OBJ"), ("BATCHSIZE", "BATCH_SIZE"), ("TEACHER_NAMES", "TEACHER_NAME"),
        ("GRADIENT_ACCUMULATION_STEPS", "GRAD_ACC"), ("SEEEDS", "SEEDS"), ("DRYRUN", "DRY_RUN")])
    def test_one_that_is_nearly_ours(self, name, meant):
        for compose in (training_options, evaluation_options):
            with pytest.raises(InputError) as error:
                compose([], GPT2 | {name: "1"})
            assert error.value.problems == [f"unknown variable {name}; did you mean {meant}?"]

    def test_those_of_others(self):
        assert training_options([], GPT2 | dict.fromkeys(FOREIGN.split(), "1")) == training_options([], GPT2)

    def test_from_a_launcher(self):
        done = run("gpt2/sft_gpt2_base", EPOCHS=3, SED=1)
        assert done.returncode == 2
        assert done.stdout.splitlines() == ["error: unknown variable EPOCHS; did you mean EPOCH?",
                                            "error: unknown variable SED; did you mean SEED?"]


def test_a_launcher_of_ones_own(tmp_path):
    """Assignments count, by `default` where nothing is set outside."""
    (tmp_path / "mine.sh").write_text(f"source {ROOT}/scripts/lib/common.sh\nLR=7e-3\ndefault EPOCH 3\ndefault SEED 4\n"
                                      'KD_PARAMS="beta=0.5"\ndefault KD_RATE 1\nFAMILY=f CKPT_NAME=c\ndistil "$@"\n')
    done = run(os.path.relpath(tmp_path / "mine", ROOT / "scripts"), DRY_RUN=1, SEED=5, LR=1, TEACHER_NAME="t")
    config = parse(TrainConfig, shlex.split(done.stdout)[3:])
    assert (config.optim.lr, config.optim.num_epochs, config.run.seed) == (7e-3, 3, 5)
    assert (config.objective.kd_params, config.objective.kd_rate) == (("beta=0.5",), 1)


def test_it_is_quick_and_says_how_it_is_called():
    program = ("import sys; from todi.launch import main; sys.argv[1:] = ['evaluate']; main(); "
               "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT / "code")}).returncode == 0
    answer = subprocess.run([sys.executable, "-m", "todi.launch", "trian"], capture_output=True, text=True,
                            env={"PYTHONPATH": str(ROOT / "code")})
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "train|evaluate|generate" in answer.stderr


def test_words_for_a_shell():
    command = [sys.executable, "-m", "todi.launch", "evaluate", "--model-path", "a b\nc"]
    environment = {"PYTHONPATH": str(ROOT / "code"), "SETS": "dolly 'the other'"}
    words = ["--sets", "dolly", "the other", "--model-path", "a b\nc"]
    assert shlex.split(subprocess.check_output(command, env=environment, text=True)) == words


def test_what_another_host_must_have_too():
    environment = {"LR": "1e-3", "KD_PARAMS": "a=1 b=2", "NCCL_DEBUG": "INFO", "PYTHON": "python3", "NNODES": "1",
                   "SSH": "ssh -v", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/home", "PATH": "/bin", "MAX_LENGTH": ""}
    assert set(handed_on(environment)) == {"LR=1e-3", "KD_PARAMS=a=1 b=2", "NCCL_DEBUG=INFO", "PYTHON=python3"}
    with pytest.raises(InputError, match="unknown variable KD_OBJJ; did you mean KD_OBJ"):
        list(handed_on({"KD_OBJJ": "ToDi"}))


@pytest.mark.parametrize("address", ["node-0.cluster.local", "10.0.0.1", "::1", "fe80::1%eth0", "2001:db8::7"])
def test_addresses_of_nodes(address):
    train(NNODES="2", NODE_RANK="0", MASTER_ADDR=address)
    for wrong in (f"http://{address}", f"{address} x", f"[{address}]"):
        with pytest.raises(InputError, match="MASTER_ADDR must be a name or an address, without a port"):
            train(NNODES="2", NODE_RANK="0", MASTER_ADDR=wrong)
