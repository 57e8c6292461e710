"""Runs that are stopped, killed or starved go on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import run, start

KD = "gpt2/vanilla_kd_gpt2_base"
LORA = {"PEFT": "lora", "LORA_ALPHA": 8, "LORA_DROPOUT": 0.1}
TIMINGS = {"seconds", "samples_per_second", "peak_memory_gib"}


@pytest.fixture(scope="session")
def settings(workshop) -> dict[str, object]:
    """Three epochs of three steps with dropout on, a state every two steps."""
    models = {role: workshop.model(f"resume-{role}", family="gpt2", hidden=hidden, seed=seed, resid_pdrop=0.2,
                                   embd_pdrop=0.2)
              for role, hidden, seed in (("teacher", 48, 1), ("student", 32, 2))}
    return workshop.settings | {"MODEL_PATH": models["student"], "TEACHER_MODEL_PATH": models["teacher"], "EPOCH": 3,
                                "SAVE_STATE_EVERY": 2, "LR": 1e-2}


class Launched:
    """A launcher under way, in a session of its own, so that all of its processes can be found."""

    def __init__(self, launcher: str, **settings: object):
        self.output = ""
        self.process = start(launcher, **settings)

    def wait_for(self, text: str) -> bool:
        """Reads on until a line has `text`; False when the run ends without it."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return True
        return False

    def stop(self, number: int) -> int:
        """Signals the launcher alone; its exit code."""
        self.process.send_signal(number)
        return self.end()

    def kill(self) -> None:
        """Kills every process of the session."""
        subprocess.run(["pkill", "-KILL", "-s", str(self.process.pid)])
        self.end()

    def end(self) -> int:
        self.output += self.process.stdout.read()
        return self.process.wait()

    def survivors(self) -> str:
        return subprocess.run(["pgrep", "-s", str(self.process.pid), "-a"], text=True, capture_output=True).stdout


def outcome(folder: Path) -> dict[str, object]:
    """What two runs must share to the bit: names and weights of checkpoints, metrics apart from timings, the end."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    end = json.loads((folder / "state" / "finished.json").read_text())
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("epoch*/*.safetensors")}
    assert weights
    return {"files": sorted(path.name for path in folder.iterdir()), "weights": weights,
            "metrics": [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines],
            "best": end["best"], "skipped": end["skipped"], "state": os.listdir(folder / "state")}


def stopped_and_resumed(folder: Path, settings: dict[str, object], after: str = "step 5/9",
                        number: int = signal.SIGTERM) -> dict[str, object]:
    """The outcome of a run that is stopped after a line of its log, and started again."""
    launched = Launched(KD, **settings, SAVE_DIR=folder)
    assert launched.wait_for(after), launched.output
    assert launched.stop(number) == 128 + number, launched.output
    assert not launched.survivors()
    again = run(KD, **settings, SAVE_DIR=folder)
    assert again.returncode == 0, again.stdout
    assert "going on from" in again.stdout
    return outcome(folder)


def uninterrupted(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    done = run(KD, **settings, SAVE_DIR=folder)
    assert done.returncode == 0, done.stdout
    return outcome(folder)


TWO_RANKS = {"NPROC": 2, "GRAD_ACC": 1}  # the same nine steps
SHAPES = {"ZeRO-1": {}, "ZeRO-0, LoRA": {"ZERO_STAGE": 0} | LORA,
          **{f"2 ranks, ZeRO-{stage}": TWO_RANKS | {"ZERO_STAGE": stage} for stage in range(4)},
          "2 ranks, ZeRO-2, LoRA": TWO_RANKS | {"ZERO_STAGE": 2} | LORA,
          "2 ranks, ZeRO-3, LoRA": TWO_RANKS | {"ZERO_STAGE": 3} | LORA}


@pytest.mark.parametrize("shape", [name if name == "ZeRO-1" else pytest.param(name, marks=pytest.mark.slow)
                                   for name in SHAPES])
def test_a_stopped_run_goes_on_bit_by_bit(shape, settings, tmp_path):
    settings = settings | SHAPES[shape]
    assert stopped_and_resumed(tmp_path / "stopped", settings) == uninterrupted(tmp_path / "whole", settings)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals(number, settings, tmp_path):
    stopped_and_resumed(tmp_path / "run", settings, number=number)


@pytest.mark.slow
def test_another_number_of_ranks_without_zero(settings, tmp_path):
    settings = settings | {"ZERO_STAGE": 0, "SAVE_DIR": tmp_path}
    launched = Launched(KD, **settings)
    launched.wait_for("step 5/9")
    launched.stop(signal.SIGTERM)
    done = run(KD, **settings, NPROC=2, GRAD_ACC=1)
    assert done.returncode == 0, done.stdout
    assert "was written by 1 ranks, there are 2 now" in done.stdout


def test_a_changed_run_is_refused_and_a_finished_one_left_alone(settings, tmp_path):
    settings = settings | {"SAVE_DIR": tmp_path, "EPOCH": 1, "EVAL_GEN": 0}
    assert run(KD, **settings).returncode == 0
    before = outcome(tmp_path)
    again = run(KD, **settings)
    assert (again.returncode, outcome(tmp_path)) == (0, before)
    assert "has finished after 3 steps; nothing to do" in again.stdout
    changed = run(KD, **settings | {"KD_RATE": 0.25, "SEED": 3})
    assert changed.returncode == 2
    assert "kd_rate was 0.5, is 0.25; seed was 10, is 3" in changed.stdout
    anew = run(KD, **settings | {"KD_RATE": 0.25, "RESUME": "never"})
    assert anew.returncode == 0, anew.stdout
    assert outcome(tmp_path)["metrics"] != before["metrics"]


@pytest.mark.slow
def test_twenty_kills(settings, tmp_path):
    kill_again_and_again(settings | {"EPOCH": 60, "SAVE_STATE_EVERY": 1, "SAVE_BEST_N_CKPTS": 2}, tmp_path, kills=20)


def kill_again_and_again(settings: dict[str, object], folder: Path, kills: int, seed: int = 0) -> None:
    """SIGKILLs a run `kills` times at random moments, starts it again each time, compares with an unharmed one."""
    moments = random.Random(seed)
    killed = 0
    while killed < kills:
        launched = Launched(KD, **settings, SAVE_DIR=folder / "killed")
        # most kills between the first step and the end, where files are written; some before
        if moments.random() < 0.9 and not launched.wait_for("acc "):
            break
        time.sleep(moments.uniform(0, 0.6))
        launched.kill()
        killed += 1
    assert killed == kills, launched.output
    last = run(KD, **settings, SAVE_DIR=folder / "killed")
    assert last.returncode == 0, last.stdout
    assert outcome(folder / "killed") == uninterrupted(folder / "whole", settings)
