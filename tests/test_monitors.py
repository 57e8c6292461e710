"""Who is told how a run goes. The trackers are driven with stand-ins that take what the real packages take."""

import json
import logging
import sys
from types import ModuleType

import pytest
from todi.errors import InputError, StorageError
from todi.training.monitors import MONITORS, JsonLines, Monitors, RunInfo, check_monitors, scalars

MIXED = {"epoch": 2, "loss": 1.5, "rouge_l": None, "what": "loss", "samples": [1, 2], "x": float("nan"),
         "y": float("inf")}
NUMBERS = {"train/epoch": 2, "train/loss": 1.5}


class Heard:
    """A monitor that keeps what it is told."""

    def __init__(self):
        self.reports, self.closed = [], False

    def log(self, kind, step, values):
        self.reports.append((kind, step, dict(values)))

    def close(self):
        self.closed = True


class Failing(Heard):
    def log(self, kind, step, values):
        super().log(kind, step, values)
        raise ConnectionError("no route to host\nand more")


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("todi"), "propagate", True)  # an entry point may have run in this process
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def run(tmp_path):
    return RunInfo(tmp_path, "gpt2-todi", {"lr": 5e-4, "peft": None}, step=0)


@pytest.fixture
def register(monkeypatch):
    """Enters a monitor for as long as the test lasts."""
    monkeypatch.setattr(MONITORS, "_entries", dict(MONITORS._entries))
    return MONITORS.add


def drive(name, run, *reports):
    """A whole life of a tracker."""
    tracker = MONITORS[name](run)
    for report in reports:
        tracker.log(*report)
    tracker.close()


# --- metrics.jsonl

def test_a_line_of_metrics(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log("train", 10, {"epoch": 1, "loss": 0.1, "norm": None, "x": float("nan"), "samples": [3, 4]})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"kind": "train", "step": 10, "epoch": 1, "loss": 0.1, "norm": null, "x": NaN, "samples": [3, 4]}\n')


def test_metrics_are_cut_where_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = JsonLines(path)
    before.log("train", 1, {})
    kept = before.bytes
    before.log("train", 2, {})
    before.close()
    after = JsonLines(path)
    after.cut(kept)
    after.log("train", 2, {"again": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": "train", "step": 1}, {"kind": "train", "step": 2, "again": 1}]
    assert after.bytes == path.stat().st_size


@pytest.fixture
def full_disk(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    return path


def test_metrics_that_cannot_be_written_end_the_run(tmp_path, full_disk):
    with pytest.raises(StorageError, match="No space left"):
        Monitors({"metrics.jsonl": JsonLines(full_disk)}).log("train", 1, {})
    with pytest.raises(StorageError, match="cannot write .*nowhere"):
        JsonLines(tmp_path / "nowhere" / "metrics.jsonl")


# --- what is checked before weights are loaded

def test_all_that_is_wrong_with_the_names_is_said_at_once(register, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_such_tracker").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    register("absent", lambda run: Heard()).package = "no_such_tracker"
    with pytest.raises(InputError) as caught:
        check_monitors(["wanbd", "absent"])
    assert caught.value.problems == [
        f"--report-to: unknown monitor 'wanbd'; did you mean wandb? allowed: {', '.join(MONITORS)}",
        "--report-to absent needs the package no_such_tracker, which is not installed: pip install no_such_tracker"]


def test_a_check_imports_nothing(monkeypatch, tmp_path):
    for name in ("tensorboard", "wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    check_monitors(["tensorboard", "WANDB", "trackio"])


def test_a_monitor_of_ones_own_needs_no_package(register):
    register("mine", lambda run: Heard())
    check_monitors(["mine"])


# --- all of them together

def test_everyone_is_told_and_closed(register, run):
    first, second = Heard(), Heard()
    register("mine", lambda given: second if given == run else None)
    monitors = Monitors({"first": first}, ["mine"], run)
    monitors.start(run.step)
    monitors.log("train", 3, MIXED)
    monitors.close()
    assert first.reports == second.reports == [("train", 3, MIXED)]
    assert first.closed and second.closed


def test_a_tracker_that_fails_is_left_out(warnings):
    failing, other = Failing(), Heard()
    monitors = Monitors({"failing": failing, "other": other})
    for step in (1, 2):
        monitors.log("train", step, {})
    assert len(failing.reports) == 1 and len(other.reports) == 2
    assert warnings.messages == [
        "monitor failing failed and is left out from here on: ConnectionError: no route to host"]


def test_a_tracker_that_cannot_start_or_close_is_left_out(register, run, warnings):
    class Reluctant(Heard):
        def close(self):
            raise TimeoutError

    def broken(run):
        raise ValueError("no key")

    register("broken", broken)
    first = Heard()
    monitors = Monitors({"first": first, "reluctant": Reluctant()}, ["broken"], run)
    monitors.start(run.step)
    monitors.log("train", 1, {})
    monitors.close()
    assert first.closed and first.reports
    assert warnings.messages == [
        "monitor broken failed and is left out from here on: ValueError: no key",
        "monitor reluctant failed and is left out from here on: TimeoutError: no reason given"]


def test_trackers_get_finite_numbers():
    assert scalars("train", MIXED) == NUMBERS


# --- TensorBoard

@pytest.fixture
def tensorboard(monkeypatch):
    """torch.utils.tensorboard, which cannot be imported without the package."""
    module = ModuleType("torch.utils.tensorboard")
    module.calls = []

    class SummaryWriter:
        def __init__(self, log_dir=None, comment="", purge_step=None, max_queue=10, flush_secs=120,
                     filename_suffix=""):
            module.calls.append(("open", log_dir, purge_step))

        def add_text(self, tag, text_string, global_step=None, walltime=None):
            module.calls.append(("text", tag, global_step))

        def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, new_style=False,
                       double_precision=False):
            module.calls.append((tag, scalar_value, global_step))

        def flush(self):
            module.calls.append("flush")

        def close(self):
            module.calls.append("close")

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_tensorboard(tensorboard, tmp_path):
    run = RunInfo(tmp_path, "name", {"folder": tmp_path}, step=20)
    drive("tensorboard", run, ("train", 30, MIXED))
    assert tensorboard.calls == [
        ("open", str(tmp_path / "tensorboard"), 21),  # step 20 was reported before its state was saved
        ("text", "settings", 20), ("train/epoch", 2, 30), ("train/loss", 1.5, 30), "flush", "close"]


# --- Weights & Biases

@pytest.fixture
def wandb(monkeypatch):
    module = ModuleType("wandb")
    module.inits, module.calls, module.settings = [], [], []

    class Settings:
        def __init__(self, *, finish_timeout=0.0, login_timeout=None):
            self.finish_timeout, self.login_timeout = finish_timeout, login_timeout

    class Run:
        def __init__(self, run_id):
            self.id = run_id

        def define_metric(self, name, step_metric=None):
            module.calls.append(("axis", name, step_metric))

        def log(self, data, step=None, commit=None):
            module.calls.append(data)

        def finish(self, exit_code=None):
            module.calls.append("finish")

    def init(*, project=None, dir=None, id=None, name=None, config=None, reinit=None, resume=None, settings=None):
        module.inits.append({"project": project, "dir": dir, "id": id, "name": name, "config": config,
                             "reinit": reinit, "resume": resume, "finish_timeout": settings.finish_timeout})
        return Run(id or f"new{len(module.inits)}")

    module.Settings, module.init, module.setup = Settings, init, module.settings.append
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_wandb(wandb, run):
    drive("wandb", run, ("train", 10, MIXED), ("skipped", 11, {"what": "loss", "samples": [1]}))
    assert wandb.inits == [{"project": "todi", "dir": str(run.folder), "id": None, "name": "gpt2-todi",
                            "config": {"lr": 5e-4, "peft": None}, "reinit": "create_new", "resume": None,
                            "finish_timeout": 60}]
    assert wandb.settings[0].login_timeout == 60
    assert wandb.calls == [("axis", "*", "step"), {"step": 10} | NUMBERS, "finish"]


def test_wandb_goes_on_with_its_run(wandb, run):
    again = RunInfo(run.folder, run.name, run.settings, step=20)
    for info in (run, again, again, run):
        drive("wandb", info)
    assert [(init["id"], init["resume"]) for init in wandb.inits] == [
        (None, None), ("new1", "allow"), ("new1", "allow"), (None, None)]
    assert (run.folder / "wandb_id.txt").read_text() == "new4\n"  # of the run that was started anew


def test_wandb_heeds_its_variables(wandb, run, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    drive("wandb", run)
    assert (wandb.inits[0]["project"], wandb.inits[0]["finish_timeout"]) == ("mine", 5)


# --- trackio

@pytest.fixture
def trackio(monkeypatch):
    module = ModuleType("trackio")
    module.inits, module.calls = [], []

    class Run:
        def log(self, metrics, step=None):
            module.calls.append((step, metrics))

    def init(project, name=None, *, config=None, resume="never"):
        module.inits.append((project, name, config, resume))
        return Run()

    module.init, module.finish = init, lambda: module.calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return module


def test_trackio(trackio, run, monkeypatch):
    drive("trackio", run, ("train", 10, MIXED), ("skipped", 11, {"what": "loss"}))
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    drive("trackio", RunInfo(run.folder, run.name, {}, step=20))
    assert trackio.inits == [("todi", "gpt2-todi", {"lr": 5e-4, "peft": None}, "never"),
                             ("mine", "gpt2-todi", {}, "allow")]
    assert trackio.calls == [(10, NUMBERS), "finish", "finish"]
