"""The training loop with stand-ins for its parts: no model, no DeepSpeed."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from todi.data.plans import StepShape
from todi.data.sample_sources import DatasetSource
from todi.data.tokenize import Example
from todi.runtime.distributed import World
from todi.runtime.signals import Interrupted
from todi.training.monitors import Monitors
from todi.training.run_folder import RunFolder
from todi.training.scores import Score
from todi.training.step import StepResult
from todi.training.trainer import Pace, Trainer, TrainingError

ALONE = World(0, 1, 0, 1)
ENGINE = SimpleNamespace(device=torch.device("cpu"), train=lambda: None, eval=lambda: None,
                         get_global_grad_norm=lambda: 1.0, optimizer=SimpleNamespace(param_groups=[]),
                         module=torch.nn.Identity(), zero_optimization_stage=lambda: 0,
                         save_checkpoint=lambda *words, **options: None)


class Step:
    """Counts the samples that it gets; one response token each."""

    engine, lr, schedule = ENGINE, 0.1, None

    def __init__(self, finite: tuple[bool, ...] | None = None):
        self.seen, self.finite = [], finite

    def expect(self, plan):
        pass

    def __call__(self, plan, with_diagnostics):
        self.seen += [example.sample_id for examples in plan.micro_batches for example in examples]
        tokens = torch.tensor(float(plan.tokens))
        return StepResult({"loss": 2 * tokens, "correct": 0 * tokens, "tokens": tokens}, self.finite, {})


def make_trainer(folder, step, steps: int = 5) -> Trainer:
    source = DatasetSource([Example((1, 2), 1, i) for i in range(6)], StepShape(batch_size=2, accumulation=1), seed=0)
    return Trainer(step, source, judge=lambda engine, asked: Score(loss=1.0, accuracy=0.5),
                   export=lambda score, path: path.mkdir(), folder=folder,
                   monitors=Monitors({"metrics.jsonl": folder.metrics} if folder.metrics else None),
                   pace=Pace(max_steps=steps, log_interval=2), world=ALONE)


def test_making_one_touches_no_file(tmp_path):
    make_trainer(RunFolder(tmp_path / "run", ALONE), Step())
    assert not list(tmp_path.iterdir())


def test_no_step_waits_for_what_the_ranks_wish(tmp_path, monkeypatch):
    done = []

    class Noted(Step):
        def __call__(self, plan, with_diagnostics):
            done.append("step")
            return super().__call__(plan, with_diagnostics)

    def later(self, values, device):
        done.append("sent")
        return lambda: done.append("read") or list(values())

    monkeypatch.setattr(World, "largest_later", later)
    folder = RunFolder(tmp_path / "run", ALONE)
    with folder.claimed():
        make_trainer(folder, Noted(), steps=3).train()
    assert done == ["sent", "step", "read"] * 3


def test_the_largest_of_all_ranks_comes_later(monkeypatch):
    """What was asked for when it was sent; a process by itself is asked when it reads."""
    heard, wishes = [], [0, False]

    def all_reduce(tensor, kind, async_op):
        def wait():
            heard.append(tensor.tolist())
            tensor.copy_(torch.tensor([15, 1]))
        assert (kind, async_op) == (torch.distributed.ReduceOp.MAX, True)
        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    several, one = (World(0, size, 0, size).largest_later(lambda: wishes, torch.device("cpu")) for size in (2, 1))
    assert heard == []
    wishes = [10, False]
    assert (several(), one()) == ([15, 1], [10, False])
    assert heard == [[0, 0]]


def test_every_epoch_is_trained_judged_and_saved(tmp_path):
    folder, step = RunFolder(tmp_path / "run", ALONE), Step()
    with folder.claimed():
        make_trainer(folder, step).train()
    assert sorted(step.seen[:6]) == list(range(6)) and len(step.seen) == 10
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert [(line["kind"], line["step"], line["loss"]) for line in lines] == [
        ("train", 2, 2.0), ("dev", 3, 1.0), ("train", 4, 2.0), ("train", 5, 2.0), ("dev", 5, 1.0)]
    assert {path.name for path in folder.path.iterdir()} == {
        "metrics.jsonl", "train.log", "state", "epoch2_step5_loss1.0000"}


def test_a_signal_breaks_off_an_evaluation_which_the_run_goes_on_with(tmp_path):
    folder = RunFolder(tmp_path / "run", ALONE)
    trainer, asked = make_trainer(folder, Step()), []

    def judge(engine, heard):
        signal.raise_signal(signal.SIGUSR1)
        asked.append(heard())
        raise Interrupted(heard())

    trainer.judge = judge
    with folder.claimed(), pytest.raises(Interrupted, match="SIGUSR1"):
        trainer.train()
    assert asked == [signal.SIGUSR1]
    assert [path.name for path in (folder.path / "state").iterdir()] == ["epoch0_step3"]


def test_one_who_wants_to_is_told_of_every_step(tmp_path):
    class Bar:
        def __init__(self):
            self.steps, self.kinds = [], []

        def step_done(self, step):
            self.steps.append(step)

        def log(self, kind, step, values):
            self.kinds.append((kind, step))

        def close(self):
            pass

    bar, folder = Bar(), RunFolder(tmp_path / "run", ALONE)
    with folder.claimed():
        trainer = make_trainer(folder, Step())
        trainer.monitors = Monitors({"metrics.jsonl": folder.metrics, "bar": bar})
        trainer.train()
    assert bar.steps == [1, 2, 3, 4, 5]
    assert [step for kind, step in bar.kinds if kind == "train"] == [2, 4, 5]


def test_peak_memory_is_that_of_the_rank_that_takes_most(tmp_path, monkeypatch):
    monkeypatch.setattr("todi.training.trainer.peak_memory_gib", lambda device: 3.0)
    monkeypatch.setattr(World, "largest", lambda self, values, device: [5.0] if values == [3.0] else list(values))
    folder = RunFolder(tmp_path / "run", ALONE)
    with folder.claimed():
        make_trainer(folder, Step()).train()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {line["peak_memory_gib"] for line in lines if line["kind"] == "train"} == {5.0}


def test_a_run_that_never_takes_a_step_ends(tmp_path):
    folder = RunFolder(tmp_path / "run", ALONE)
    with pytest.raises(TrainingError, match="10 steps in a row were not finite"), folder.claimed():
        make_trainer(folder, Step(finite=(False,)), steps=20).train()
    assert "error: 10 steps in a row" in (tmp_path / "run" / "train.log").read_text()


def test_the_folder_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        with RunFolder(tmp_path / "run", ALONE).claimed():
            pass
