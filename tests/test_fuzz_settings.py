"""--check-only and the run agree on variables: whatever is set, what passes the check trains, or scores."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from launching import ROOT, Workshop, in_ten_thousand_tries, run
from test_adapters import save_adapter
from todi import evaluate
from todi.errors import InputError
from todi.evaluation import eval_inputs
from todi.launch import evaluation_options, training_options
from todi.options import Option, declared, parse
from todi.runtime.distributed import World
from todi.settings import LAUNCHER_VARIABLES, PUBLISHED, EvalConfig, TrainConfig
from todi.train import train
from todi.training.trainer import TrainingError

ALONE, CPU = World(0, 1, 0, 1), torch.device("cpu")

LARGE = "9" * 18
WHOLE = ["1", "2", "3", "7", "0", "-1", "1.5", "1e3", "x", " 2", "0x10", "1_0", "٣", "nan", LARGE, "9" * 30]
NUMBERS = ["0.5", "1", "0", "-1", "1e-3", "2", "nan", "inf", "1e300", "1e38", "1e-45", "1e-320", "x", "0,5", " 1"]
BOOLEANS = ["0", "1", "true", "False", "yes", "2", "x"]
# Of these {...} are things that are there.
WORDS = [
    "x", "auto", "none", "{student}", "{teacher}", "{adapter}", "{data}", "{data}/train.jsonl", "{folder}", "{mine}",
    "{mine}:logits", "{mine}:bad", "{deepspeed}", "{student} {teacher}", "{data} {other}", "nowhere/at/all",
    "/dev/null/x", "a/../b", ".", "..", "-x", "--lr", "a b", "it's", '"', "\udcff", "\udce4ndere", "é", "x" * 300,
    "x/" * 3000, "a\nb", "beta=0.5", "beta=x", "beta=1e400", "alpha=2", "skew_lambda=0.2", "hidden_states=0.1",
    "hidden_states=1e400", "1:1", "9:9", "1:1 2:2", "30m", "0m", "9" * 30, "2026-01-31", "2026-02-31", "ToDi", "tvd",
    "adaptive_kl", "skewed_forward_kl", "llama", "gpt2", "0.5 0.5", "1 2", "q_proj", "c_attn", "all-linear"]
# Left as they are: what would take a terabyte or a year, what other machines answer for, and the check itself.
STAY = {"REPORT_TO", "CHECK_ONLY", "NPROC", "NNODES"}
NOT_LARGE = {"EPOCH", "LORA_RANK"}
NOT_INTO = {"SAVE_DIR", "TEACHER_CACHE"}  # whatever is written there does not go into models and data


# Where a try of a training begins.
BEGINNINGS = [{}, {"CRITERION": "cross_entropy"}, {"PEFT": "lora"}, {"PEFT": "lora", "PEFT_PATH": "{adapter}"},
              {"TEACHER_PEFT_PATH": "{adapter}", "TEACHER_MODEL_PATH": "{student}"}, {"DATA_DIR": "{data} {other}"},
              {"TEACHER_MODEL_PATH": "{teacher} {student}"},
              {"TEACHER_MODEL_PATH": "", "TEACHER_CALLABLE": "{mine}:logits"},
              {"TEACHER_CACHE": "on"}, {"LOSS_TERMS": "hidden_states=0.1"}, {"DEEPSPEED_CONFIG": "{deepspeed}"},
              {"ZERO_STAGE": "3"}, {"EVAL_GEN": "1"}, {"GRADIENT_CHECKPOINTING": "1"}, {"PRECISION": "bf16"}]


def values(one: Option, variable: str) -> st.SearchStrategy[str]:
    """Typical, on the edge, out of range, and of another type."""
    typical = {int: ["1", "2", "3"], float: ["0.5", "0.1", "2"], bool: ["0", "1"]}.get(one.type) or one.choices
    numbers = {int: WHOLE, float: NUMBERS, bool: BOOLEANS}.get(one.type, WORDS)
    others = [text for text in numbers if not (text == LARGE and variable in NOT_LARGE)]
    if variable in NOT_INTO:
        others = [text for text in others if "{" not in text or "/" in text]
    if one.many and one.type is not str:
        others += ["0.5 0.5", "1 2", "1 x"]
    return st.sampled_from(list(typical)) | st.sampled_from(others) if typical else st.sampled_from(others)


def settings_of(config_type: type, beginnings: list[dict[str, str]]) -> st.SearchStrategy[dict[str, str]]:
    """Up to three variables: of the settings, now and then of the launchers, of published scripts, or misspelt."""
    known = {variable: values(one, variable) for options in declared(config_type).values() for one in options
             for variable in one.variables if variable not in STAY}
    further = {name: st.sampled_from([*WORDS, *WHOLE]) for name in {*LAUNCHER_VARIABLES, *PUBLISHED} - STAY}
    further |= {name: st.sampled_from(["1", "x"]) for name in known for name in (name[:-1], name + "S")}
    names = st.sampled_from([*sorted(known) * 12, *sorted(further)])
    both = further | known
    changes = st.lists(names, max_size=3, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: both[name] for name in chosen}))
    return st.builds(lambda one, other: one | other, st.sampled_from(beginnings), changes)


class Shop:
    """Models, data and the usual settings; what became of each try."""

    def __init__(self, workshop: Workshop, folder: Path):
        self.folder, self.counts = folder, Counter()
        self.there = {
            "student": workshop.model("fuzz-student", family="llama", seed=2),
            "teacher": workshop.model("fuzz-teacher", family="llama", hidden=48, seed=1), "data": workshop.data,
            "other": folder / "\udce4ndere", "folder": folder, "adapter": folder / "adapter",
            "mine": folder / "mine.py", "deepspeed": folder / "ds.json"}
        for copy in (self.there["other"], folder / "sets" / "tiny", folder / "sets" / "\udce4ndere"):
            shutil.copytree(workshop.data, copy)
        save_adapter(self.there["student"], folder / "adapter")
        self.there["mine"].write_text("import torch\nbad = 3\n"
                                      "logits = lambda batch: torch.zeros(len(batch.rows), 400)\n")
        self.there["deepspeed"].write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}))
        self.usual = {"MAX_LENGTH": "64", "MAX_PROMPT_LENGTH": "48", "PRECISION": "fp32"}
        self.training = self.usual | {
            "MODEL_PATH": "{student}", "TEACHER_MODEL_PATH": "{teacher}", "DATA_DIR": "{data}", "MAX_STEPS": "1",
            "EPOCH": "1", "EVAL_GEN": "0", "LORA_RANK": "4", "TEACHER_CACHE": "off", "SAVE_DIR": "{folder}/run"}
        self.evaluation = self.usual | {"MODEL_PATH": "{student}", "SETS_DIR": "{folder}/sets", "SETS": "tiny",
                                        "SEEDS": "1", "LIMIT": "2", "MAX_NEW_TOKENS": "4"}

    def filled_in(self, variables: Mapping[str, str]) -> dict[str, str]:
        return {name: re.sub(r"{(\w+)}", lambda match: str(self.there[match[1]]), value)
                for name, value in variables.items()}

    def train(self, variables: Mapping[str, str]) -> None:
        """What passes the check trains, or ends for numbers that are not finite."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        try:
            config = parse(TrainConfig, training_options([], self.filled_in(self.training | variables)))
            train(dataclasses.replace(config, run=dataclasses.replace(config.run, check_only=True)), ALONE, CPU)
        except InputError as refused:
            self.refuse("training", refused)
            return
        try:
            train(config, ALONE, CPU)
        except TrainingError:
            self.counts["training that did not converge"] += 1
        else:
            self.counts["trained"] += 1

    def evaluate(self, variables: Mapping[str, str]) -> None:
        """What passes the check is scored."""
        for name in ("student", "teacher", "adapter"):
            shutil.rmtree(self.there[name] / "eval", ignore_errors=True)
        try:
            config = parse(EvalConfig, evaluation_options([], self.filled_in(self.evaluation | variables)))
            eval_inputs.read_inputs(config, CPU)
        except InputError as refused:
            self.refuse("evaluation", refused)
            return
        evaluate.evaluate(config, ALONE, CPU)
        self.counts["evaluated"] += 1

    def refuse(self, what: str, refused: InputError) -> None:
        assert refused.problems and all(len(problem.splitlines()) == 1 for problem in refused.problems)
        self.counts[f"refused {what}"] += 1


def try_settings(workshop: Workshop, folder: Path, examples: int, first: int = 0) -> Counter[str]:
    """What became of so many trainings, and of a third as many evaluations."""
    shop = Shop(workshop, folder)
    relaxed = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @seed(first)
    @settings(relaxed, max_examples=examples * 3 // 4)
    @given(settings_of(TrainConfig, BEGINNINGS))
    def trainings(variables: dict[str, str]) -> None:
        shop.train(variables)

    @seed(first)
    @settings(relaxed, max_examples=examples // 4)
    @given(settings_of(EvalConfig, [{}]))
    def evaluations(variables: dict[str, str]) -> None:
        shop.evaluate(variables)

    trainings()
    evaluations()
    return shop.counts


@pytest.mark.slow
def test_settings_that_pass_the_check_train_and_score(workshop, tmp_path, monkeypatch, process_group):
    monkeypatch.chdir(tmp_path)
    counts = try_settings(workshop, tmp_path, 60)
    assert counts["trained"] > 2 and counts["evaluated"] > 2 and counts["refused training"] > 10, counts


@in_ten_thousand_tries
def test_settings_that_pass_the_check_train_and_score_in_ten_thousand_tries(first, tmp_path):
    """A thousand at a time in a process of its own: DeepSpeed keeps what an engine held."""
    work = ("import os, pathlib, torch, test_fuzz_settings as test\n"
            "from launching import Workshop\n"
            "from todi.runtime.distributed import process_group, world_from_environment\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            "os.chdir(folder)\n"
            "with process_group(world_from_environment(), torch.device('cpu')):\n"
            f"    print('counts', test.try_settings(Workshop(folder / 'shop'), folder, 1000, first={first}))")
    done = subprocess.run([sys.executable, "-c", work], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | {"PYTHONPATH": f"{ROOT / 'code'}:{ROOT / 'tests'}"})
    assert done.returncode == 0 and "'trained'" in done.stdout, done.stdout[-3000:]


# What bash itself reads.
BASH = {
    "GPUS": ["", "0", "0,1", "0 1", "(0 1 2 3)", "cpu", "CPU", "none", "-1", "x", "0,x", "0-3", "all", ",",
             "GPU-8932f937", "'"],
    "CUDA_VISIBLE_DEVICES": ["", "0", "0,1", "-1", "0,-1,1", "NoDevFiles", "GPU-1,GPU-2", "MIG-1c2d", " 1", "x"],
    "NPROC": ["1", "2", "0", "-1", "x", "08", "٣", "1.5", " 2", "9" * 30, "1+1", "a[$(echo x >&2)]"],
    "NNODES": ["1", "2", "0", "x", "1:4", "08", "٣"], "NODE_RANK": ["0", "1", "2", "x", "01"],
    "MASTER_ADDR": ["localhost", "x y", "-x"], "MASTER_PORT": ["29501", "0", "99999", "x", "08"],
    "RENDEZVOUS_TIMEOUT": ["60", "0", "-1", "x", "nan", "inf", "1e300"], "DRY_RUN": ["1", "0", "true", "x"],
    "DOCTOR": ["", "0", "x"], "CKPT_PATH": ["x", "-x", "a b"], "SAVE_PATH": ["x", "-x", "'"],
    "CKPT_TYPE": ["gpt2", "x"], "TEACHER_MODEL_NAME": ["x", "-x"], "GPUS_PER_NODE": ["2", "x"],
    "CRITERION": ["cross_entropy", "vanilla_kd", "x"],
    "OMP_NUM_THREADS": ["2", "x"], "PEFT": ["lora", "full", "x"], "TEACHER_PEFT": ["lora", "full", "x"]}
LAUNCHERS = ["gpt2/vanilla_kd_gpt2_base", "qwen2.5/sft_qwen2.5", "eval/run_eval"]


def try_bash(examples: int, first: int = 0) -> Counter[int]:
    """Exit codes of launchers that print their command."""
    codes: Counter[int] = Counter()

    @seed(first)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(LAUNCHERS), st.lists(st.sampled_from(sorted(BASH)), max_size=4, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: st.sampled_from(BASH[name]) for name in chosen})))
    def attempt(launcher: str, variables: dict[str, str]) -> None:
        words = ["ckpt"] * launcher.startswith("eval/")
        done = run(launcher, *words, **{"DRY_RUN": "1"} | variables)
        codes[done.returncode] += 1
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            assert "-m todi." in lines[-1]
        else:
            assert done.returncode == 2, done.stdout
            assert all(line.startswith(("error: ", "note: ")) for line in lines), done.stdout

    attempt()
    return codes


def test_what_bash_reads(tmp_path):
    codes = try_bash(40)
    assert codes[0] > 3 and codes[2] > 3


@in_ten_thousand_tries
def test_what_bash_reads_in_a_thousand_tries(first):
    codes = try_bash(100, first)
    assert codes[0] > 10 and codes[2] > 10
