"""A run goes on with other ranks, at another ZeRO stage, with or without offload, as if nothing had changed."""

import json
from pathlib import Path

import pytest
from launching import in_tiers, run
from safetensors.torch import load_file
from stopping import KD

LORA = {"PEFT": "lora", "LORA_ALPHA": 8, "LORA_DROPOUT": 0}
BOTH = {"OFFLOAD": "optimizer param"}
STOPPED_AT = 4  # in the second epoch, a step after a line of the log

# Has the last rank ask for an end after a step, once.
_STOPPER = """
import os, pathlib, signal
from todi.training.trainer import Trainer

wishes = Trainer._wishes

def stop_and_wish(self):
    mark = pathlib.Path(self.folder.path, "stopped")
    if self.at.step == {step} and self.world.rank == self.world.size - 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return wishes(self)

Trainer._wishes = stop_and_wish
"""


@pytest.fixture(scope="module")
def steady(workshop, tmp_path_factory) -> dict[str, object]:
    """Settings of two epochs of three steps of 8 samples, without dropout, that stop once.

    Without a large epsilon Adam would blow up the rounding errors of gradients that are zero in truth.
    """
    models = {role: workshop.model(f"layouts-{role}", family="gpt2", hidden=hidden, seed=seed, resid_pdrop=0.0,
                                   embd_pdrop=0.0, attn_pdrop=0.0)
              for role, hidden, seed in (("teacher", 48, 1), ("student", 32, 2))}
    plugin = tmp_path_factory.mktemp("stopper") / "stopper.py"
    plugin.write_text(_STOPPER.format(step=STOPPED_AT))
    return workshop.settings | {"MODEL_PATH": models["student"], "TEACHER_MODEL_PATH": models["teacher"], "EPOCH": 2,
                                "EVAL_GEN": 0, "PLUGINS": plugin, "LOG_INTERVAL": 3, "BATCH_SIZE": 4, "LR": 1e-2,
                                "ADAM_EPS": 1e-3}


@pytest.fixture(scope="module")
def undisturbed(steady, tmp_path_factory):
    """The folder of a run of one rank that nothing stopped, by its further settings."""
    folders: dict[str, Path] = {}

    def find(more: dict[str, object]) -> Path:
        name = str(sorted(more.items()))
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("undisturbed")
            (folders[name] / "stopped").touch()
            done = run(KD, **steady | more, SAVE_DIR=folders[name])
            assert done.returncode == 0, done.stdout
        return folders[name]

    return find


def told(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of the lines of metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] in ("train", "dev")]


WORLDS = {
    "half as many, stage 3 to 1": ({}, {"NPROC": 2, "ZERO_STAGE": 3}, {"NPROC": 1, "ZERO_STAGE": 1}),
    "twice as many": ({}, {"NPROC": 2, "ZERO_STAGE": 3}, {"NPROC": 4, "ZERO_STAGE": 3}),
    "stage 1 to 3, offloaded": ({}, {"NPROC": 2, "ZERO_STAGE": 1}, {"NPROC": 2, "ZERO_STAGE": 3} | BOTH),
    "stage 0 to 2": ({}, {"NPROC": 1, "ZERO_STAGE": 0}, {"NPROC": 2, "ZERO_STAGE": 2}),
    "LoRA, stage 3 to 0": (LORA, {"NPROC": 2, "ZERO_STAGE": 3}, {"NPROC": 1, "ZERO_STAGE": 0}),
    "LoRA, offloaded to not": (LORA, {"NPROC": 2, "ZERO_STAGE": 3} | BOTH, {"NPROC": 1, "ZERO_STAGE": 2}),
}


@pytest.mark.parametrize("name", in_tiers(WORLDS, always=list(WORLDS)[:1], slowly=["stage 1 to 3, offloaded"]))
def test_the_world_may_change(name, steady, undisturbed, tmp_path):
    """The same command with other devices: steps stay of 8 samples, which are those of the first two ranks or one."""
    more, then, now = WORLDS[name]
    settings = steady | more | {"SAVE_DIR": tmp_path / "run", "GRAD_ACC": 2 // then["NPROC"]}
    first = run(KD, **settings | then)
    assert first.returncode and "stopped by SIGTERM" in first.stdout, first.stdout
    again = run(KD, **settings | now)
    assert again.returncode == 0, again.stdout
    assert f"epoch 2, step {STOPPED_AT}" in again.stdout
    before, after = (f"{one['NPROC']} rank{'s' * (one['NPROC'] > 1)} at ZeRO stage {one['ZERO_STAGE']}"
                     for one in (then, now))
    assert f"the state of {before} goes on with {after}" in again.stdout

    whole = undisturbed(more)
    ours, theirs = told(tmp_path / "run"), told(whole)
    assert [step for step, _ in ours] == [step for step, _ in theirs] == [3, 3, 6, 6]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-5)
    (ours,), (theirs,) = (list(map(load_file, folder.glob("epoch*/*.safetensors")))
                          for folder in (tmp_path / "run", whole))
    assert max((ours[name] - weight).abs().max().item() for name, weight in theirs.items()) < 1e-5
