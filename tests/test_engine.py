"""Optimizer, schedules, DeepSpeed configuration, precision, checkpoints: the parts that need no training run."""

import json

import pytest
import torch
from todi.errors import InputError, StorageError
from todi.runtime.device import Precision, choose_device, choose_precision
from todi.training.checkpoints import BestCheckpoints, Score
from todi.training.deepspeed_config import build_deepspeed_config
from todi.training.optimizer import SCHEDULES, build_optimizer, build_schedule

FP32 = Precision("fp32", "test")


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


class TestDeepSpeedConfig:
    def build(self, tmp_path, override):
        file = tmp_path / "ds.json"
        file.write_text(override if isinstance(override, str) else json.dumps(override))
        return build_deepspeed_config(precision=FP32, zero_stage=1, batch_size=4, accumulation=2, clip_grad=1.0,
                                      override_file=str(file))

    def test_a_files_keys_win_and_its_autos_do_not(self, tmp_path):
        config = self.build(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
                                       "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": 4})
        assert config["zero_optimization"] == {"stage": 3}
        assert config["gradient_clipping"] == 1.0

    @pytest.mark.parametrize(("override", "said"), [
        ({"train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True}},
         "changes train_micro_batch_size_per_gpu, bf16.enabled"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
         "offload_param needs ZeRO stage 3 or more, got 2"),
        ("{", "Expecting property name"), ("[]", "expected an object")])
    def test_what_a_file_may_not_do(self, tmp_path, override, said):
        with pytest.raises(InputError, match=said):
            self.build(tmp_path, override)


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == Precision("fp32", "asked for")
    assert choose_precision("auto", cpu).name in ("bf16", "fp32")
    with pytest.raises(InputError, match="fp16 does not train on a CPU"):
        choose_precision("fp16", cpu)


class TestDevice:
    """On a machine with a GPU that this PyTorch cannot use."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch, tmp_path):
        (tmp_path / "version").write_text("NVRM version")
        monkeypatch.setattr("todi.runtime.device._DRIVER", tmp_path / "version")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.version.cuda", "13.0")
        for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)

    def test_it_is_not_passed_over(self, monkeypatch):
        def too_old():
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore")
        monkeypatch.setattr("torch.cuda.init", too_old)
        with pytest.raises(InputError, match=r"too old \(found version 11040\)\. Install a PyTorch that fits"):
            choose_device()

    def test_a_pytorch_without_cuda(self, monkeypatch):
        monkeypatch.setattr("torch.version.cuda", None)
        with pytest.raises(InputError, match="cannot use: it was built without CUDA"):
            choose_device()

    @pytest.mark.parametrize(("name", "value"), [
        ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("DS_ACCELERATOR", "cpu")])
    def test_who_wants_the_cpu_gets_it(self, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        assert choose_device() == torch.device("cpu")


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
