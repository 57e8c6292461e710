"""Runs that are stopped or killed go on as if nothing had happened."""

import json
import os
import signal
import time

import pytest
import torch
from launching import exhaustive, in_tiers, run, slow
from stopping import KD, TWO_RANKS, Launched, finished, gone_on_with, killed_again_and_again, outcome, stopped

LORA = {"PEFT": "lora", "LORA_ALPHA": 8, "LORA_DROPOUT": 0.1}
SHAPES = {"ZeRO-1": {}, "ZeRO-0, LoRA": {"ZERO_STAGE": 0} | LORA,
          **{f"2 ranks, ZeRO-{stage}": TWO_RANKS | {"ZERO_STAGE": stage} for stage in range(4)},
          "2 ranks, ZeRO-2, LoRA": TWO_RANKS | {"ZERO_STAGE": 2} | LORA,
          "2 ranks, ZeRO-3, LoRA": TWO_RANKS | {"ZERO_STAGE": 3} | LORA,
          "2 ranks, ZeRO-2, bf16": TWO_RANKS | {"ZERO_STAGE": 2, "PRECISION": "bf16"}}


@pytest.mark.parametrize("shape", in_tiers(SHAPES, always={"ZeRO-1"}, slowly={
    "ZeRO-0, LoRA", "2 ranks, ZeRO-3"}))
def test_a_stopped_run_goes_on_bit_by_bit(shape, settings, tmp_path):
    settings = settings | SHAPES[shape]
    stopped(tmp_path / "stopped", settings)
    assert gone_on_with(tmp_path / "stopped", settings) == finished(tmp_path / "whole", **settings)


@pytest.mark.parametrize("number", [exhaustive(signal.SIGINT), exhaustive(signal.SIGUSR1)])
def test_other_signals(number, settings, tmp_path):
    assert f"stopped by {number.name}" in stopped(tmp_path, settings | TWO_RANKS, number).output
    gone_on_with(tmp_path, settings | TWO_RANKS)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(settings, tmp_path):
    launched = Launched(**settings | {"GRAD_ACC": 10_000, "PACKING": "off"}, SAVE_DIR=tmp_path)  # a step takes a minute
    assert launched.wait_for("teacher "), launched.output
    time.sleep(5)
    launched.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert launched.process.poll() is None
    assert launched.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert not launched.survivors()
    assert "stopped by" not in launched.output


@pytest.mark.exhaustive
def test_another_number_of_ranks_without_zero(settings, tmp_path):
    settings = settings | {"ZERO_STAGE": 0}
    stopped(tmp_path, settings)
    done = run(KD, **settings | TWO_RANKS, SAVE_DIR=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "was written by 1 ranks, there are 2 now" in done.stdout


@pytest.mark.slow
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
def test_force_goes_on_with_another_learning_rate(settings, tmp_path):
    stopped(tmp_path, settings | {"LR_SCHEDULER": "constant"})
    changed = settings | {"LR_SCHEDULER": "constant", "LR": 1e-4, "RESUME": "force", "CLIP_GRAD": 0.5}
    done = run(KD, **changed, SAVE_DIR=tmp_path)
    assert done.returncode == 0, done.stdout
    for said in "going on though lr was 0.01, is 0.0001", "from here on lr 0.01 -> 0.0001", "clip_grad 1.0 -> 0.5":
        assert said in done.stdout
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert len(rates) == 18 and set(rates[:5]) == {1e-2} and set(rates[6:]) == {1e-4}


@pytest.mark.parametrize("kills", [slow(3), exhaustive(20)])
def test_kills(settings, tmp_path, kills):
    settings = settings | {"EPOCH": 60, "SAVE_STATE_EVERY": 1, "SAVE_BEST_N_CKPTS": 2}
    killed = killed_again_and_again(tmp_path / "killed", kills, **settings)
    assert killed == finished(tmp_path / "whole", **settings)


# Kills the last rank after some steps, each time once.
_KILLER = """
import os, pathlib, signal
from todi.training.trainer import Trainer

heed = Trainer._heed_signals_and_clock

def heed_or_die(self, *wishes):
    heed(self, *wishes)
    mark = pathlib.Path({folder!r}, f"killed{{self.at.step}}")
    if self.at.step in {steps} and self.world.rank == self.world.size - 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._heed_signals_and_clock = heed_or_die
"""


@pytest.fixture
def killed(settings, tmp_path):
    """Settings of a run that is killed twice, and is to start anew at first."""
    (tmp_path / "killer.py").write_text(_KILLER.format(folder=str(tmp_path), steps=(5, 10)))
    return settings | {"PLUGINS": tmp_path / "killer.py", "SAVE_DIR": tmp_path / "run", "RESUME": "never"}


@pytest.mark.parametrize("shape", [exhaustive({}), slow(TWO_RANKS)])
def test_a_run_that_breaks_off_goes_on_by_itself(shape, killed, settings, tmp_path):
    twice = run(KD, **killed | shape, MAX_RESTARTS=2)
    assert twice.returncode == 0, twice.stdout
    assert "(restart 2 of 2)" in twice.stdout
    assert outcome(tmp_path / "run") == finished(tmp_path / "whole", **settings | shape)


@pytest.mark.slow
def test_it_does_so_no_more_often_than_it_is_told(killed):
    """And from its last state, not from the beginning."""
    once = run(KD, **killed, MAX_RESTARTS=1)
    assert once.returncode == 137, once.stdout
    assert once.stdout.count("going on from its last state (restart 1 of 1)") == 1
    assert once.stdout.count("going on from") == 2 and "epoch 2, step 4" in once.stdout


def test_what_is_refused_is_not_tried_again(settings, tmp_path):
    done = run(KD, **settings | {"KD_RATE": 2, "SAVE_DIR": tmp_path}, MAX_RESTARTS=3)
    assert done.returncode == 2 and "restart" not in done.stdout
    assert run(KD, **settings | {"SAVE_DIR": tmp_path}, MAX_RESTARTS="often").returncode == 2


class Intruder:
    def __reduce__(self):
        return open, (os.environ["INTRUDER"], "w")


@pytest.mark.slow
def test_a_state_that_no_run_wrote_is_not_executed(settings, tmp_path, monkeypatch):
    stopped(tmp_path / "run", settings)
    monkeypatch.setenv("INTRUDER", str(tmp_path / "executed"))
    for name in "rank0.pt", "deepspeed/mp_rank_00_model_states.pt":
        for state in (tmp_path / "run" / "state").iterdir():
            file = state / name
            torch.save(Intruder(), file)
            record = json.loads((state / "state.json").read_text())
            record["files"][name] = file.stat().st_size
            (state / "state.json").write_text(json.dumps(record))
        again = run(KD, **settings, SAVE_DIR=tmp_path / "run", INTRUDER=tmp_path / "executed")
        assert again.returncode == 2
        assert "holds more than tensors and numbers" in again.stdout
    assert not (tmp_path / "executed").exists()
