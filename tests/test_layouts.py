"""A run goes on with other ranks, at another ZeRO stage, with or without offload, as if nothing had changed."""

from pathlib import Path

import pytest
from differences import differences, told
from launching import in_tiers, run
from stopping import KD, steady, stopper

LORA = {"PEFT": "lora", "LORA_ALPHA": 8, "LORA_DROPOUT": 0}
BOTH = {"OFFLOAD": "optimizer param"}
STOPPED_AT = 4  # in the second epoch, a step after a line of the log


@pytest.fixture(scope="module")
def of_eight(workshop) -> dict[str, object]:
    """Settings of a run with steps of 8 samples, or what an epoch has left."""
    return steady(workshop) | {"LOG_INTERVAL": 3, "BATCH_SIZE": 4}


@pytest.fixture(scope="module")
def undisturbed(of_eight, tmp_path_factory):
    """The folder of a run of one rank that nothing stopped, by its further settings."""
    folders: dict[str, Path] = {}

    def find(more: dict[str, object]) -> Path:
        name = str(sorted(more.items()))
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("undisturbed")
            done = run(KD, **of_eight | more, SAVE_DIR=folders[name])
            assert done.returncode == 0, done.stdout
        return folders[name]

    return find


WORLDS = {
    "half as many, stage 3 to 1": ({}, {"NPROC": 2, "ZERO_STAGE": 3}, {"NPROC": 1, "ZERO_STAGE": 1}),
    "twice as many": ({}, {"NPROC": 2, "ZERO_STAGE": 3}, {"NPROC": 4, "ZERO_STAGE": 3}),
    "stage 1 to 3, offloaded": ({}, {"NPROC": 2, "ZERO_STAGE": 1}, {"NPROC": 2, "ZERO_STAGE": 3} | BOTH),
    "stage 0 to 2": ({}, {"NPROC": 1, "ZERO_STAGE": 0}, {"NPROC": 2, "ZERO_STAGE": 2}),
    "LoRA, stage 3 to 0": (LORA, {"NPROC": 2, "ZERO_STAGE": 3}, {"NPROC": 1, "ZERO_STAGE": 0}),
    "LoRA, offloaded to not": (LORA, {"NPROC": 2, "ZERO_STAGE": 3} | BOTH, {"NPROC": 1, "ZERO_STAGE": 2}),
}


@pytest.mark.parametrize("name", in_tiers(WORLDS, slowly=["stage 1 to 3, offloaded"]))
def test_the_world_may_change(name, of_eight, undisturbed, tmp_path):
    """The same command with other devices: steps stay of 8 samples, which are those of the first two ranks or one."""
    more, then, now = WORLDS[name]
    settings = of_eight | more | {"SAVE_DIR": tmp_path / "run", "GRAD_ACC": 2 // then["NPROC"],
                                  "PLUGINS": stopper(tmp_path / "stopper.py", STOPPED_AT)}
    first = run(KD, **settings | then)
    assert first.returncode and "stopped by SIGTERM" in first.stdout, first.stdout
    again = run(KD, **settings | now)
    assert again.returncode == 0, again.stdout
    assert f"epoch 2, step {STOPPED_AT}" in again.stdout
    before, after = (f"{one['NPROC']} rank{'s' * (one['NPROC'] > 1)} at ZeRO stage {one['ZERO_STAGE']}"
                     for one in (then, now))
    assert f"the state of {before} goes on with {after}" in again.stdout

    assert [line["step"] for kind in ("train", "dev") for line in told(tmp_path / "run", kind)] == [3, 6, 3, 6]
    assert differences(tmp_path / "run", undisturbed(more)).are_within(2e-6)
