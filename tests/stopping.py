"""Runs of one launcher that are stopped or killed, and what is left of them."""

import json
import os
import random
import signal
import time
import uuid
from pathlib import Path

import psutil
from launching import Workshop, run, start

KD = "gpt2/vanilla_kd_gpt2_base"
TWO_RANKS = {"NPROC": 2, "GRAD_ACC": 1}  # with as many samples a step as one rank has
SPEED = {"tokens_per_second", "positions_per_second", "padding", "mfu", *(
    f"seconds_{phase}" for phase in ("data", "generation", "teacher", "student", "loss", "optimizer", "waiting"))}
TIMINGS = {"seconds", "samples_per_second", "peak_memory_gib", *SPEED}


def resumable(workshop: Workshop) -> dict[str, object]:
    """Settings of six epochs of three steps with dropout on, a state every two steps."""
    models = {role: workshop.model(f"resume-{role}", family="gpt2", hidden=hidden, seed=seed, resid_pdrop=0.2,
                                   embd_pdrop=0.2)
              for role, hidden, seed in (("teacher", 48, 1), ("student", 32, 2))}
    return workshop.settings | {"MODEL_PATH": models["student"], "TEACHER_MODEL_PATH": models["teacher"], "EPOCH": 6,
                                "SAVE_STATE_EVERY": 2, "LR": 1e-2}


def steady(workshop: Workshop) -> dict[str, object]:
    """Settings of two epochs of 18 samples without dropout, a checkpoint after each.

    Without a large epsilon Adam would blow up the rounding errors of gradients that are zero in truth.
    """
    models = {role: workshop.model(f"steady-{role}", family="gpt2", hidden=hidden, seed=seed, resid_pdrop=0.0,
                                   embd_pdrop=0.0, attn_pdrop=0.0)
              for role, hidden, seed in (("teacher", 48, 1), ("student", 32, 2))}
    return workshop.settings | {"MODEL_PATH": models["student"], "TEACHER_MODEL_PATH": models["teacher"], "EPOCH": 2,
                                "EVAL_GEN": 0, "SAVE_BEST_N_CKPTS": 2, "LR": 1e-2, "ADAM_EPS": 1e-3}


_STOPPER = """
import os, pathlib, signal
from todi.training.trainer import Trainer

wishes = Trainer._wishes

def stop_and_wish(self):
    mark = pathlib.Path(self.folder.path, f"stopped after step {self.at.step}")
    if self.at.step in STEPS and self.world.rank == self.world.size - 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return wishes(self)

Trainer._wishes = stop_and_wish
"""


def stopper(file: Path, *steps: int) -> Path:
    """Writes a plugin by which the last rank asks for an end after each of these steps, once in a run's folder."""
    file.write_text(_STOPPER.replace("STEPS", repr(steps)))
    return file


class Launched:
    """A run under way, of a training if nothing else is said.

    Its processes are known by a mark in their environment, whoever their parent is.

    Args:
        words: for the launcher.
        prefix: a command that runs the launcher's.
    """

    def __init__(self, *words: str, launcher: str = KD, prefix: tuple[str, ...] = (), **settings: object):
        self.output = ""
        self._mark = uuid.uuid4().hex
        self.process = start(launcher, *words, prefix=prefix, MARK=self._mark, **settings)

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
        """Kills every process of the run."""
        while left := self.survivors():
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=1)
        self.end()

    def end(self) -> int:
        """Reads the rest of the output; the exit code."""
        self.output += self.process.stdout.read()
        return self.process.wait()

    def survivors(self) -> list[psutil.Process]:
        """The processes of the run that live."""
        return [process for process in psutil.process_iter(["environ"])
                if (process.info["environ"] or {}).get("MARK") == self._mark
                and process.status() != psutil.STATUS_ZOMBIE]

    def orphans(self, seconds: float) -> list[psutil.Process]:
        """The processes of the run that live on after so many seconds."""
        end = time.monotonic() + seconds
        while (left := self.survivors()) and time.monotonic() < end:
            time.sleep(0.2)
        return left


def outcome(folder: Path) -> dict[str, object]:
    """What two runs must share to the bit: names and weights of checkpoints, metrics apart from timings, the end."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    end = json.loads((folder / "state" / "finished.json").read_text())
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("epoch*/*.safetensors")}
    assert weights
    return {"files": sorted(path.name for path in folder.iterdir()), "weights": weights,
            "metrics": [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines],
            "best": end["best"], "skipped": end["skipped"], "state": os.listdir(folder / "state")}


def stopped(folder: Path, settings: dict[str, object], number: int = signal.SIGTERM) -> Launched:
    """A run that a signal stopped in its second epoch."""
    launched = Launched(**settings, SAVE_DIR=folder)
    assert launched.wait_for("step 5/18"), launched.output
    assert launched.stop(number) == 128 + number, launched.output
    assert not launched.survivors()
    return launched


def gone_on_with(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """The outcome of the run in `folder`, started again."""
    again = run(KD, **settings, SAVE_DIR=folder)
    assert again.returncode == 0, again.stdout
    assert "going on from" in again.stdout
    return outcome(folder)


def finished(folder: Path, **settings: object) -> dict[str, object]:
    """The outcome of a run that nothing disturbs."""
    done = run(KD, **settings, SAVE_DIR=folder)
    assert done.returncode == 0, done.stdout
    return outcome(folder)


def killed_again_and_again(folder: Path, kills: int, seed: int = 0, **settings: object) -> dict[str, object]:
    """SIGKILLs a run `kills` times at random moments, starts it again each time and lets it end; the outcome."""
    moments = random.Random(seed)
    for _ in range(kills):
        launched = Launched(**settings, SAVE_DIR=folder)
        # most kills come between the first step and the end, where files are written; some before
        if moments.random() < 0.9:
            assert launched.wait_for("acc "), f"it ended before it was killed:\n{launched.output}"
        time.sleep(moments.uniform(0, 0.6))
        launched.kill()
    return finished(folder, **settings)
