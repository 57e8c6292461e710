"""todi.distil and todi.evaluate in somebody's process: what they return, and that the process is what it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import todi
import torch
from launching import ROOT, Workshop, exhaustive, write_data
from todi.errors import InputError
from todi.given import data_folders, model_path, rows_of, sets_folder
from todi.options import from_keywords, parse
from todi.results import Result
from todi.settings import TrainConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = {"num_epochs": 2, "max_length": 64, "max_prompt_length": 48, "precision": "fp32", "log_interval": 1,
            "lr": 1e-2, "teacher_cache": "off", "eval_gen": False}


def environment() -> dict[str, str]:
    ours = {"PYTHONPATH": f"{ROOT / 'code'}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | ours


def run_program(program: str, plan: dict, folder: Path, ranks: int = 1) -> dict:
    """What tests/<program>.py writes, in a process of its own or in several under torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan, default=str))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [ROOT / "tests" / f"{program}.py", folder / "plan.json", folder / "out.json"]
    done = subprocess.run([sys.executable, *torchrun, *words], env=environment(), cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "out.json").read_text())


def host_plan(workshop: Workshop, folder: Path, own_group: bool = False) -> dict:
    return {"student": workshop.model("gpt2-student", seed=2),
            "teacher": workshop.model("gpt2-teacher", hidden=48, seed=1), "data": workshop.data,
            "sets_dir": workshop.data.parent, "folder": folder / "runs", "settings": SETTINGS, "own_group": own_group}


@pytest.mark.slow
class TestAGuest:
    @pytest.fixture(scope="class")
    def found(self, workshop, tmp_path_factory) -> dict:
        folder = tmp_path_factory.mktemp("guest")
        return run_program("guest", host_plan(workshop, folder), folder)

    def test_the_process_is_what_it_was(self, found):
        assert found["changed"] == {name: {} for name in (
            "distil", "another", "evaluate", "refused", "in a script", "early", "late", "terminated")}
        assert found["free"] == [True, True]

    def test_a_second_run_in_the_same_process_is_one_of_its_own(self, found):
        assert len(found["first"]) == len(found["second"]) == 6
        assert found["first"] == found["thread"] != found["second"]

    def test_what_is_returned_shows_itself(self, found):
        assert Path(found["best"][0]).is_dir() and (Path(found["best"][1]) / "adapter_config.json").is_file()
        assert "finished. Best checkpoint: epoch" in found["text"][0] and "| epoch | step" in found["text"][0]
        assert f"{found['scores']['tiny']:.2f}" in found["text"][1]
        assert "<table>" in found["html"][0] and 'src="data:image/png;base64,' in found["html"][0]
        assert "<th>tiny</th>" in found["html"][1]

    def test_an_unknown_setting_is_refused(self, found):
        assert found["refused"] == "there is no setting lr_rate; did you mean kd_rate?"

    def test_ctrl_c_saves_the_state(self, found):
        """A script gets its KeyboardInterrupt; at a prompt what there is comes back, and the same call goes on."""
        assert found["script"].startswith("KeyboardInterrupt('stopped by SIGINT")
        assert "stopped by SIGINT" in found["early"]["stopped"] and "stopped by SIGINT" in found["early"]["text"]
        assert found["early"]["losses"] == found["first"][:3]
        assert found["late"]["stopped"] is None and found["late"]["losses"] == found["first"]

    def test_another_signal_reaches_the_host(self, found):
        assert found["heard"] == ["SIGTERM"]


def test_a_row_of_a_result_has_no_losses_of_an_earlier_one(tmp_path):
    """Epochs shorter than the interval of the log have none of their own."""
    lines = [{"kind": kind, "epoch": epoch, "step": step, "loss": loss} for kind, epoch, step, loss in (
        ("dev", 1, 2, 4.0), ("train", 2, 3, 3.0), ("dev", 2, 4, 2.0), ("dev", 3, 6, 1.0), ("train", 4, 7, 0.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = repr(Result(tmp_path, None, evaluate=None, settings={})).splitlines()[3:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [(cell[2], cell[3], cell[6]) for cell in cells] == [
        ("2", "–", "4.0000"), ("4", "3.0000", "2.0000"), ("6", "–", "1.0000"), ("7", "0.5000", "–")]


@pytest.mark.slow
@pytest.mark.parametrize("own_group", [exhaustive(False), True], ids=["no group", "a group of the host's"])
def test_two_ranks_under_torchrun(workshop, tmp_path, own_group):
    """Twice in a process: a group that the host has made is used and stays; else there is none afterwards."""
    found = run_program("guest", host_plan(workshop, tmp_path, own_group), tmp_path, ranks=2)
    assert not any(found["changed"].values()) and len(found["changed"]) == 4
    assert len(found["first"]) == len(found["second"]) and Path(found["best"][1]).is_dir()
    assert found.get("all reduced") == (2.0 if own_group else None)


DOORS = ("script", "notebook", "trainer")
RUNS = {"SFT": ("cross_entropy", None), "SFT, LoRA": ("cross_entropy", "lora"), "ToDi": ("ToDi", None),
        "ToDi, LoRA": ("ToDi", "lora"), "AdaKD": ("AdaKD", None)}
# So that it moves within four steps.
MOVING = {"share_momentum": 0.5, "share_rate": 0.2, "share_tolerance": 0.001}


def of_divergence(run: dict) -> dict[str, str]:
    """The launcher's variables for a run's objective."""
    if run["objective"] == "cross_entropy":
        return {}
    return {"KD_OBJ": run["objective"],
            "KD_PARAMS": " ".join(f"{name}={value}" for name, value in run["kd_params"].items())}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, exhaustive(2)])
def test_every_door_gives_the_same_losses(workshop, tmp_path, ranks):
    """A notebook, a script, ToDiTrainer, by itself and with ZeRO-3, and the launcher: fp32, to 1e-6 of the value."""
    from evaluating import add_adapter  # imports DeepSpeed

    student, teacher = workshop.model("gpt2-student", seed=2), workshop.model("gpt2-teacher", hidden=48, seed=1)
    add_adapter(student, tmp_path / "adapter")
    data = write_data(tmp_path / "data" / "doors", train=16, dev=4)
    settings = SETTINGS | {"global_batch_size": 8, "batch_size": 2, "seed": 10, "progress": False}
    runs = [{"name": name, "objective": objective, "kd_params": MOVING if objective == "AdaKD" else {},
             "peft_path": peft and tmp_path / "adapter",
             "folder": str(tmp_path / name.replace(", ", "-"))} for name, (objective, peft) in RUNS.items()]
    variables = {"MODEL_PATH": student, "TEACHER_MODEL_PATH": teacher, "DATA_DIR": data, "EPOCH": 2, "LR": 1e-2,
                 "EVAL_GEN": 0, "GLOBAL_BATCH_SIZE": 8, "BATCH_SIZE": 2, "NPROC": ranks}
    launched = {run["name"]: workshop.train(
        "gpt2/vanilla_kd_gpt2_base" if run["objective"] != "cross_entropy" else "gpt2/sft_gpt2_base",
        f"doors-{ranks}-{run['name']}", **variables, **of_divergence(run),
        **{"PEFT": "lora", "PEFT_PATH": run["peft_path"]} if run["peft_path"] else {}) for run in runs}
    found = run_program("doors", {"student": student, "teacher": teacher, "data": data, "settings": settings,
                                  "runs": runs}, tmp_path, ranks)
    for name, started in launched.items():
        lines = started.result()
        assert lines.exit_code == 0, lines.output
        train = lines.metrics("train")
        assert len(train) == 4 and (name != "AdaKD" or len({line["kd_share"] for line in train}) > 1)
        for door in (*DOORS, "zero") if ranks > 1 and name == "ToDi" else DOORS:
            ours = found[f"{name} {door}"]
            assert len(ours) == len(train)
            for line, expected in zip(ours, train, strict=True):
                assert {"loss", "ce", "accuracy"} <= line.keys()
                assert line.keys() & {"kd", "kd_share"} == expected.keys() & {"kd", "kd_share"}
                expected = pytest.approx({part: expected[part] for part in line}, rel=5e-6, abs=1e-6)
                assert line == expected, f"{name} {door}"


class TestSettings:
    """from_keywords: what the command line reads from flags."""

    def test_they_are_those_of_the_command_line(self):
        config = from_keywords(TrainConfig, {"model_path": Path("a"), "teacher_model_path": ["b"], "lr": 1,
                                             "kd_params": {"beta": 0.5}, "data_dir": "d", "peft": None})
        assert (config.student.model_path, config.teacher.teacher_model_path, config.optim.lr) == ("a", ("b",), 1.0)
        assert (config.objective.kd_params, config.data.data_dir) == (("beta=0.5",), ("d",))
        assert isinstance(config.optim.lr, float)

    def test_all_that_is_wrong_is_said_at_once(self):
        with pytest.raises(InputError) as refused:
            from_keywords(TrainConfig, {"kd_rat": 1, "batch_size": True, "lr": "x", "kd_temperature": -1, "seed": 1.5})
        assert refused.value.problems == [
            "there is no setting kd_rat; did you mean kd_rate?", "--batch-size must be a whole number, got True",
            "--lr must be a number, got 'x'", "--seed must be a whole number, got 1.5",
            "--model-path is required", "--kd-temperature must be above 0, got -1.0",
            "--criterion vanilla_kd needs --teacher-model-path or --teacher-callable"]

    def test_advice_has_the_names_of_the_call(self):
        with pytest.raises(InputError, match="^there is no setting objectve; did you mean objective[?]$"):
            todi.distil("a", "b", data="c", save_dir="d", objectve="forward_kl")

    @pytest.mark.parametrize("theirs, ours", [
        ("learning_rate", "lr"), ("per_device_train_batch_size", "batch_size"), ("num_train_epochs", "num_epochs"),
        ("warmup_steps", "warmup_iters"), ("lr_scheduler_type", "lr_scheduler"), ("max_grad_norm", "clip_grad"),
        ("logging_steps", "log_interval"), ("save_total_limit", "keep_best_n_checkpoints"),
        ("output_dir", "save_dir"), ("bf16", "precision"), ("fp16", "precision")])
    def test_names_of_training_arguments_are_translated(self, theirs, ours):
        with pytest.raises(InputError, match=f"there is no setting {theirs}; did you mean {ours}[?]"):
            from_keywords(TrainConfig, {theirs: 1})
        with pytest.raises(InputError, match=f"unknown option --{theirs}; did you mean --{ours.replace('_', '-')}[?]"):
            parse(TrainConfig, [f"--{theirs}", "1"])


ROWS = [{"prompt": f"Say {number}:", "output": f"{number}."} for number in range(25)]


class Rows:
    """As a datasets.Dataset: it yields rows and has a length, and is neither a list nor a Sequence."""

    def __iter__(self):
        return iter(ROWS)

    def __len__(self):
        return len(ROWS)


class TestWhatIsGiven:
    """given.py: objects as files."""

    def lines(self, folder: str, split: str) -> list[dict]:
        return [json.loads(line) for line in Path(folder, f"{split}.jsonl").read_text().splitlines()]

    def test_of_records_every_tenth_is_kept_apart(self, tmp_path):
        folder, = data_folders(Rows(), tmp_path)
        assert self.lines(folder, "dev") == [ROWS[9], ROWS[19]]
        assert self.lines(folder, "train") == [row for number, row in enumerate(ROWS) if number not in (9, 19)]

    def test_splits_have_their_names(self, tmp_path):
        folder, = data_folders({"train": ROWS[:3], "validation": Rows(), "test": ROWS[:1]}, tmp_path)
        assert (self.lines(folder, "train"), self.lines(folder, "dev")) == (ROWS[:3], ROWS)

    def test_a_folder_is_named_by_its_contents(self, tmp_path):
        """The same again is the same folder, so a run resumes; nothing is ever written over."""
        (first,), (again,), (other,) = (data_folders(rows, tmp_path) for rows in (ROWS, Rows(), ROWS[:9]))
        assert first == again != other
        assert len(list(tmp_path.iterdir())) == 2

    def test_folders_stay_what_they_are(self, tmp_path):
        assert data_folders("a", tmp_path) == ["a"] and data_folders([tmp_path, "b"], tmp_path) == [str(tmp_path), "b"]

    def test_texts_are_no_records(self, tmp_path):
        with pytest.raises(InputError, match=r"none of these is one, the first: 'Q: a\\nA: b'; records are dicts"):
            data_folders(["Q: a\nA: b", "Q: c\nA: d"], tmp_path)

    @pytest.mark.parametrize("data", [[], [1, 2], 7, {"train": ROWS}, ROWS[:1], b"text"])
    def test_other_data_is_refused(self, tmp_path, data):
        with pytest.raises(InputError, match="data"):
            data_folders(data, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_loaded_model_is_written_with_its_tokenizer(self, workshop, tmp_path):
        path = workshop.model("gpt2-student", seed=2)
        model = AutoModelForCausalLM.from_pretrained(path)
        written = model_path(model, None, tmp_path, "student")
        assert written == model_path(model, AutoTokenizer.from_pretrained(path), tmp_path, "student")
        again = AutoModelForCausalLM.from_pretrained(written).state_dict()
        assert all(again[name].equal(value) for name, value in model.state_dict().items())
        with torch.no_grad():
            next(model.parameters()).add_(1)
        assert model_path(model, None, tmp_path, "student") != written

    def test_what_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="teacher must be a path, a Hub name or a transformers model, got a int"):
            model_path(3, None, tmp_path, "teacher")

    def test_sets_stay_below_their_folder(self, tmp_path):
        assert self.lines(Path(sets_folder({"a/b": ROWS}, tmp_path)) / "a" / "b", "valid") == ROWS
        with pytest.raises(InputError, match="'../a' cannot be the name of a folder"):
            sets_folder({"../a": ROWS}, tmp_path)

    def test_rows_are_dicts(self):
        with pytest.raises(InputError, match="got a list of str"):
            rows_of(["a"], "data")

    def test_bad_records_are_named_by_their_numbers(self, tmp_path):
        """As in a file; nothing of them is written."""
        with pytest.raises(InputError) as refused:
            data_folders({"train": [*ROWS[:2], {"question": "a", "answer": "b"}, {"prompt": "a", "output": ""}],
                          "dev": ROWS}, tmp_path)
        assert refused.value.problems == ['data["train"][2]: lacks prompt and output; has answer, question',
                                          'data["train"][3]: `output` is empty']
        with pytest.raises(InputError, match="data: 15 more bad records"):
            rows_of([{}] * 35, "data")
        assert not list(tmp_path.iterdir())


def test_importing_it_is_light():
    """What is named in todi is imported when it is used."""
    code = ("import sys, todi; assert not {'torch', 'transformers'} & set(sys.modules); assert 'distil' in dir(todi); "
            "import todi.evaluate; assert callable(todi.evaluate); "
            "import todi.train, todi.doctor; assert 'scipy.stats' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
