"""Optimizer, schedules, precision, checkpoints: the parts that need no training run."""

import pytest
import torch
from todi.errors import InputError, StorageError
from todi.runtime.device import Precision, choose_precision
from todi.training.checkpoints import BestCheckpoints, Score
from todi.training.optimizer import SCHEDULES, build_optimizer, build_schedule


def test_one_dimensional_parameters_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    groups = build_optimizer(model, lr=1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 3)]
    model[0].weight.requires_grad_(True)
    groups = build_optimizer(model, lr=1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def rates(name: str, steps: int, warmup: int = 0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, name, total_steps=steps, warmup_steps=warmup, lr=2.0, lr_min=0.2)
    values = []
    for _ in range(steps + 1):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize(("name", "middle", "end"), [
    ("constant", 2.0, 2.0), ("linear", 1.1, 0.2), ("cosine", 1.1, 0.2),
    ("noam", 2 * (1 / 5) ** 0.5, 2 * (1 / 10) ** 0.5)])
def test_schedules(name, middle, end):
    values = rates(name, 10)
    assert values[0] == pytest.approx(2.0)
    assert values[5] == pytest.approx(middle)
    assert values[10] == pytest.approx(end)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(name):
    assert rates(name, 12, warmup=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == Precision("fp32", "asked for")
    assert choose_precision("auto", cpu).name in ("bf16", "fp32")
    with pytest.raises(InputError, match="fp16 does not train on a CPU"):
        choose_precision("fp16", cpu)


class TestBestCheckpoints:
    def offer(self, best, rouge_l, epoch, fail=False):
        def save(path):
            path.mkdir()
            if fail:
                raise OSError("disk full")
        best.offer(Score(loss=1.0, rouge_l=rouge_l), epoch, epoch * 10, save)

    def kept(self, folder):
        return sorted(path.name.split("_")[0] for path in folder.glob("epoch*"))

    def test_the_best_stay_and_of_equals_the_earlier(self, tmp_path):
        best = BestCheckpoints(tmp_path, keep=2, writes_files=True)
        for epoch, rouge_l in enumerate([5.0, 3.0, 4.0, 5.0, 9.0], 1):
            self.offer(best, rouge_l, epoch)
        assert self.kept(tmp_path) == [f"epoch{i}" for i in range(1, 6)]  # a state may count on them
        best.release()
        assert self.kept(tmp_path) == ["epoch1", "epoch5"]

    def test_a_failed_save_leaves_the_older_ones(self, tmp_path):
        best = BestCheckpoints(tmp_path, keep=1, writes_files=True)
        self.offer(best, 1.0, 1)
        with pytest.raises(StorageError, match=f"cannot write {tmp_path}/epoch2.*disk full"):
            self.offer(best, 2.0, 2, fail=True)
        assert [path.name.split("_")[0] for path in tmp_path.iterdir()] == ["epoch1"]

    def test_without_generation_the_loss_ranks(self):
        assert Score(loss=1.0).rank > Score(loss=2.0).rank
        assert Score(1.5).folder_name(2, 30) == "epoch2_step30_loss1.5000"
        assert Score(1.5, 20.25).folder_name(2, 30) == "epoch2_step30_loss1.5000_rougel20.2500"
