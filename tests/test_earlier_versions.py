"""What version 0.1 wrote is still read: resume states, finished runs, caches, checkpoints, results."""

import json
import shutil
from pathlib import Path

import pytest
from launching import ROOT, run
from safetensors.torch import load_file

ASSETS = Path("tests", "assets", "v0.1")  # as the runs were told, from the root of the repository
SETTINGS = {"MODEL_PATH": ASSETS / "student", "TEACHER_MODEL_PATH": ASSETS / "teacher", "DATA_DIR": ASSETS / "data",
            "EPOCH": 3, "MAX_LENGTH": 64, "MAX_PROMPT_LENGTH": 48, "PRECISION": "fp32", "LOG_INTERVAL": 1, "LR": 1e-2,
            "SAVE_STATE_EVERY": 2}


@pytest.fixture
def earlier(tmp_path) -> Path:
    return Path(shutil.copytree(ROOT / ASSETS, tmp_path / "earlier"))


def train(earlier: Path, name: str) -> str:
    done = run("gpt2/vanilla_kd_gpt2_base", **SETTINGS, TEACHER_CACHE=earlier / "cache", SAVE_DIR=earlier / name)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_stopped_run_goes_on_from_its_state_and_its_cache(earlier):
    shard = (earlier / "cache" / "shard00000").stat().st_mtime_ns
    said = train(earlier, "stopped")
    assert "going on from" in said and "teacher: read from" in said
    assert (earlier / "cache" / "shard00000").stat().st_mtime_ns == shard
    stopped, finished = (next((earlier / name).glob("epoch3*")) for name in ("stopped", "finished"))
    weights, expected = (load_file(folder / "model.safetensors") for folder in (stopped, finished))
    for name, weight in expected.items():
        assert (weights[name] - weight).norm() <= 1e-2 * weight.norm(), name  # Adam magnifies rounding
    lines, expected = ([json.loads(line) for line in (earlier / name / "metrics.jsonl").read_text().splitlines()]
                       for name in ("stopped", "finished"))
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_a_finished_run_is_left_alone(earlier):
    assert "has finished after 9 steps; nothing to do" in train(earlier, "finished")


def test_results_are_not_made_again(earlier):
    checkpoint, = (earlier / "finished").glob("epoch*")
    before = (checkpoint / "eval" / "results.json").read_text()
    done = run("eval/run_eval", str(checkpoint), DATA_DIR=earlier, SETS="data", SEEDS="1 2", LIMIT=3, MAX_LENGTH=64,
               MAX_PROMPT_LENGTH=48, PRECISION="fp32")
    assert done.returncode == 0, done.stdout
    assert "every set and seed is there already" in done.stdout
    assert json.loads((checkpoint / "eval" / "results.json").read_text())["sets"] == json.loads(before)["sets"]
