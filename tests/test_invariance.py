"""That the table of invariance can be made, and that it sees what is not the same."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from differences import differences
from launching import ROOT
from safetensors.torch import save_file


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import invariance

    return invariance


def a_run(folder: Path, loss: float = 2.0, norm: float | None = 0.5, dev: float = 3.0, weight: float = 1.0,
          steps: tuple[int, ...] = (1, 2)) -> Path:
    """What is compared of one, in `folder`; the numbers are those of the last step."""
    folder.mkdir()
    lines = [{"kind": "train", "step": step, "loss": loss if step == steps[-1] else 4.0, "gradient_norm": norm}
             for step in steps]
    lines.append({"kind": "dev", "step": steps[-1], "loss": dev})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for epoch, value in ((9, 7.0), (10, weight)):  # the last one counts
        (folder / f"epoch{epoch}_step1_loss1.0").mkdir()
        save_file({"a": torch.tensor([1.0, value]), "b": torch.tensor([[-4.0]])},
                  folder / f"epoch{epoch}_step1_loss1.0" / "model.safetensors")
    return folder


@pytest.mark.parametrize(("changed", "value", "found"), [
    ("loss", 2.0002, 1e-4), ("norm", 0.4999, 2e-4), ("dev", 3.003, 1e-3), ("weight", 1.25, 1 / 16),
    ("loss", float("nan"), None), ("norm", None, None), ("weight", float("inf"), float("inf"))])
def test_what_differs_is_seen(tmp_path, changed, value, found):
    whole = a_run(tmp_path / "whole")
    apart = differences(a_run(tmp_path / "other", **{changed: value}), whole)
    assert not apart.are_within(1e-5)
    assert found is None or vars(apart) == pytest.approx(
        {"loss": 0, "norm": 0, "dev": 0, "weights": 0} | {"weights" if changed == "weight" else changed: found})
    assert differences(whole, whole).are_within(0)


def test_runs_of_other_steps_are_not_compared(tmp_path):
    with pytest.raises(ValueError, match=r"has train lines of the steps \[1, 2, 3\], \S+ of \[1, 2\]"):
        differences(a_run(tmp_path / "other", steps=(1, 2, 3)), a_run(tmp_path / "whole"))


def test_each_row_is_one_of_its_own(benchmark):
    names = Counter(row.name for row in benchmark.ROWS)
    assert max(names.values()) == 1
    assert not [row.name for row in benchmark.ROWS if row.is_base] and all(row.base.is_base for row in benchmark.ROWS)
    worlds = [world for row in benchmark.ROWS for world in row.worlds]
    assert {(world.stage, world.offload) for world in worlds} == {
        *((stage, "") for stage in range(4)), *((stage, "optimizer") for stage in (1, 2, 3)), (3, "optimizer param")}
    assert {(world.nodes, world.ranks) for world in worlds} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)}
    assert {feature for row in benchmark.ROWS for feature in row.features} == benchmark.FEATURES.keys()


def test_rows_whose_base_fails_are_rows_all_the_same(benchmark, tmp_path, monkeypatch, capsys):
    """The others go on, and it is not run again."""
    started = []

    def run(row, folder, settings):
        started.append(row.name)
        if row.is_base and row.features:
            raise benchmark.RunFailed("ended with 1", "its output")
        return a_run(folder)

    monkeypatch.setattr(benchmark.Row, "run", run)
    monkeypatch.setattr(benchmark, "steady", lambda workshop: {})
    world = benchmark.World(batch=1)
    rows = [benchmark.Row([world], ["LoRA"]), benchmark.Row([world]), benchmark.Row([world, world], ["LoRA"])]
    assert benchmark.measure(rows, tmp_path, 0) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"| {rows[0].name} | FAILED: its base: ended with 1 | | | |", f"| {rows[1].name} | 0 | 0 | 0 | 0 |",
        f"| {rows[2].name} | FAILED: its base has failed, see above | | | |"]
    assert said.err.strip() == "its output" and len(started) == 3


@pytest.mark.slow
def test_a_row(benchmark, tmp_path, capsys):
    row = next(row for row in benchmark.ROWS if row.name == "1 rank by 3, ZeRO 1")
    assert benchmark.measure([row], tmp_path, 1e-5) == 0
    assert capsys.readouterr().out.startswith("| 1 rank by 3, ZeRO 1 | ")
