"""A run on several data folders: how it is mixed, how it goes on, what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, write_data
from stopping import outcome
from todi.errors import InputError
from todi.options import parse
from todi.runtime.checksums import file_checksum
from todi.settings import TrainConfig
from todi.training.train_inputs import read_inputs


@pytest.fixture
def words(settings, tmp_path) -> list[str]:
    """Options of a distillation on two folders of 18 and 14 records, of which only the first has dev records."""
    folders = write_data(tmp_path / "one", train=18, dev=4), write_data(tmp_path / "two", train=14)
    options = {"--model-path": settings["MODEL_PATH"], "--teacher-model-path": settings["TEACHER_MODEL_PATH"],
               "--teacher-cache": "off", "--num-epochs": 3, "--max-length": 64, "--max-prompt-length": 48,
               "--precision": "fp32", "--log-interval": 1, "--save-state-every": 2, "--adam-eps": 1e-2, "--lr": 1e-2}
    return [*(str(word) for pair in options.items() for word in pair), "--no-eval-gen", "--data-dir",
            *map(str, folders), "--data-shares", "3", "1"]


def train(folder: Path, *words: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "todi.train", *map(str, words), "--save-dir", folder], text=True,
                            env=os.environ | {"PYTHONPATH": ROOT / "code", "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(folder: Path, *words: object) -> dict[str, object]:
    """The outcome of a run that nothing disturbs, with its output."""
    output, _ = (process := train(folder, *words)).communicate()
    assert process.returncode == 0, output
    return outcome(folder) | {"output": output}


def losses(found: dict[str, object]) -> list[float]:
    return [line["loss"] for line in found["metrics"] if line["kind"] == "train"]


@pytest.mark.slow
def test_it_goes_on_bit_by_bit_and_a_teacher_cache_fits(words, tmp_path):
    whole = finished(tmp_path / "whole", *words)
    assert f"an epoch has 32 samples: 24 of {tmp_path}/one (which has 18), 8 of {tmp_path}/two" in whole["output"]
    assert len(losses(whole)) == 12
    process = train(tmp_path / "stopped", *words)
    assert any("step 6/12" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    again = finished(tmp_path / "stopped", *words)
    assert "going on from" in again["output"]
    assert {**again, "output": ""} == {**whole, "output": ""}
    cached = finished(tmp_path / "cached", *words, "--teacher-cache", tmp_path / "cache")
    assert "its weights are not in memory" in cached["output"]
    assert losses(cached) == pytest.approx(losses(whole), rel=1e-6)

    checksums = {str(file): file_checksum(file) for file in tmp_path.glob("*/*.jsonl") if "metrics" not in file.name}
    files = json.loads((tmp_path / "whole" / "args.json").read_text())["files"]
    card = next((tmp_path / "whole").glob("epoch*/README.md")).read_text()
    assert len(checksums) == 3
    for file, checksum in checksums.items():
        assert files[file] == checksum
        assert f"| `{file}` | `{checksum}` |" in card


@pytest.mark.parametrize(("changed", "said"), [
    (["--data-dir", "{one}"], "--data-shares needs a number for each folder of --data-dir, which has 1; got 3.0 1.0"),
    (["--data-shares", "1", "inf"], "--data-shares must be finite, got inf"),
    (["--data-dir", "{one}", "{one}/"], "--data-dir names a folder more than once: {one} {one}/"),
    (["--data-dir"], "--data-dir needs at least one folder"),
    (["--data-dir", "{two}", "{three}"], "no such data file: {two}/dev.jsonl\nno such data file: {three}/dev"),
    (["--data-dir", "{one}", "{four}"], "no such data file: {four}/train.jsonl"),
    (["--data-shares", "1000", "1"], "--data-shares 1000.0 1.0 leaves a folder out of an epoch of 32 samples: 32 of")])
def test_what_cannot_be_mixed(words, tmp_path, changed, said):
    write_data(tmp_path / "three", train=3)
    folders = {name: tmp_path / name for name in ("one", "two", "three", "four")}
    config = parse(TrainConfig, [*words, *(word.format(**folders) for word in changed)])
    with pytest.raises(InputError) as error:
        read_inputs(config, torch.device("cpu"))
    assert said.format(**folders) in str(error.value)
