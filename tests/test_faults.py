"""Full disks, read-only folders, vanished mounts, and numbers that are not finite."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import in_tiers, run
from stopping import KD, TWO_RANKS, Launched, finished, gone_on_with, stopped
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

# Root ignores permissions, but not without this capability.
AS_A_USER = ("setpriv", "--bounding-set=-dac_override")
POISON = "~"  # no other text has it


def refused(folder: Path, settings: dict[str, object], said: str, prefix: tuple[str, ...] = ()) -> None:
    """A run that ends with a clear line."""
    done = run(KD, prefix=prefix, **settings, SAVE_DIR=folder)
    assert done.returncode not in (0, 2)
    assert f"error: {said}" in done.stdout
    assert "Traceback" not in done.stdout


def snapshot(folder: Path) -> dict[str, bytes]:
    """The checkpoints and states in `folder`."""
    return {str(path): path.read_bytes() for path in folder.glob("[es]*/**/*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("kilobytes", "every", "what"), [(600, 1, "state/epoch"), (100, 0, "epoch")])
def test_a_full_disk(kilobytes, every, what, settings, tmp_path):
    settings, folder = settings | {"SAVE_STATE_EVERY": every, "SAVE_BEST_N_CKPTS": 9}, tmp_path / "full"
    stopped(folder, settings)
    before = snapshot(folder)
    refused(folder, settings, f"cannot write {folder}/{what}", prefix=("prlimit", f"--fsize={kilobytes * 1024}"))
    assert before.items() <= snapshot(folder).items()
    assert gone_on_with(folder, settings) == finished(tmp_path / "whole", **settings)


@pytest.mark.slow
def test_a_read_only_folder(settings, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, settings)
    before = snapshot(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    refused(folder, settings, f"cannot write {folder}/.lock: ", AS_A_USER)
    refused(folder / "below", settings, f"cannot write {folder}/below: ", AS_A_USER)
    assert snapshot(folder) == before


@pytest.mark.slow
def test_a_vanished_mount(settings, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    launched = Launched(**settings | {"EPOCH": 60}, SAVE_DIR=folder)
    assert launched.wait_for("dev after epoch 1"), launched.output
    assert launched.wait_for("step 5/"), launched.output
    folder.rename(elsewhere)
    assert launched.end() == 1
    assert f"error: cannot write {folder}/" in launched.output
    assert "Traceback" not in launched.output
    assert not folder.exists()
    elsewhere.rename(folder)
    assert gone_on_with(folder, settings | {"EPOCH": 60})


@pytest.fixture(scope="session")
def poisoned(workshop) -> dict[str, object]:
    """A teacher that answers NaN to whatever has POISON in it."""
    path = workshop.folder / "models" / "poisoned"
    tokenizer = tiny_tokenizer(path)
    tiny_model(path, "llama", vocab=len(tokenizer), tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    token, = tokenizer(POISON)["input_ids"]
    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(path)
    student = workshop.model("gpt2-student", family="gpt2", hidden=32, seed=2)
    return workshop.settings | {"MODEL_PATH": student, "TEACHER_MODEL_PATH": path, "EVAL_GEN": 0, "EPOCH": 2}


def poison(settings: dict[str, object], folder: Path, records: list[int]) -> dict[str, object]:
    """Settings with a copy of the training data in which some records hold POISON."""
    shutil.copytree(settings["DATA_DIR"], folder)
    lines = list(map(json.loads, (folder / "train.jsonl").read_text().splitlines()))
    for i in records:
        lines[i]["output"] += POISON
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return settings | {"DATA_DIR": folder}


BAD_STEP_SHAPES = {"ZeRO-1": {}, "ZeRO-0": {"ZERO_STAGE": 0}, "ZeRO-0, bf16": {"ZERO_STAGE": 0, "PRECISION": "bf16"},
                   **{f"2 ranks, ZeRO-{stage}, {precision}": TWO_RANKS | {"ZERO_STAGE": stage, "PRECISION": precision}
                      for stage in range(4) for precision in ("fp32", "bf16")}}


@pytest.mark.parametrize("shape", in_tiers(BAD_STEP_SHAPES, always={"ZeRO-1"}, slowly={
    "ZeRO-0, bf16", "2 ranks, ZeRO-3, bf16"}))
def test_a_bad_step_is_skipped_and_named(shape, poisoned, tmp_path):
    settings = poison(poisoned, tmp_path / "data", [7]) | BAD_STEP_SHAPES[shape]
    assert finished(tmp_path / "run", **settings)["skipped"] == 2  # once an epoch
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    bad = [line for line in lines if line["kind"] == "skipped"]
    assert all(7 in line["samples"] and len(line["samples"]) <= 4 and line["what"] == "loss" for line in bad)
    assert all(line["loss"] == pytest.approx(5, abs=4) for line in lines if line["kind"] == "dev")


def test_nothing_but_bad_steps_ends_the_run(poisoned, tmp_path):
    settings = poison(poisoned, tmp_path / "data", list(range(18))) | {"MAX_BAD_STEPS": 4, "SAVE_STATE_EVERY": 1}
    refused(tmp_path / "run", settings, "4 steps in a row were not finite; the states and checkpoints before them")
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == ["epoch0_step3", "epoch1_step3"]
