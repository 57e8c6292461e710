"""Optimizer, schedules, precision, checkpoints: the parts that need no training run."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from todi.data.records import Record
from todi.data.tokenize import encode_prompts
from todi.errors import InputError, StorageError
from todi.evaluation import rouge
from todi.generation.decoding import Decoding, generate, to_texts
from todi.models.families import FAMILIES
from todi.models.loading import load_model, load_tokenizer
from todi.runtime.device import Precision, choose_device, choose_precision
from todi.runtime.distributed import World
from todi.training.checkpoints import BestCheckpoints
from todi.training.dev import DevSet
from todi.training.optimizer import SCHEDULES, build_optimizer, build_schedule
from todi.training.scores import Score
from todi.training.state import Position
from todi.training.student import Student

CPU = torch.device("cpu")
nan, inf = math.nan, math.inf


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


def test_dev_scores_are_means_over_several_samples_of_a_prompt(tmp_path, monkeypatch):
    tiny_tokenizer(tmp_path)
    tokenizer, model = load_tokenizer(str(tmp_path)), load_model(str(tiny_model(tmp_path)), torch.float32, CPU)
    records = [Record(text, ("the number is 7", "a number")) for text in ("Write a", "Write the number", "One")]
    prompts, written = encode_prompts(records, tokenizer, FAMILIES["gpt2"], 48), []

    def noted(model, prompts, keys, **settings):
        responses = generate(model, prompts, keys, **settings)
        written.append(list(zip(keys, prompts, responses, strict=True)))
        return responses
    monkeypatch.setattr("todi.training.dev.generate", noted)
    score = [DevSet(records, (), prompts, tokenizer, Decoding(16), 2, seed=1, world=World(0, 1, 0, 1), collate=None,
                    samples=samples).rouge_l(model) for samples in (1, 3)]
    once, thrice = written
    assert thrice[::3] == once  # the first is what it is alone
    assert [prompt for _, prompt, _ in thrice] == [prompt for prompt in prompts for _ in range(3)]
    assert len({key for key, _, _ in thrice}) == 9 and len({tuple(row.ids) for _, _, row in thrice}) > 3
    references = [record.references for record in records for _ in range(3)]
    scores = rouge.rouge_l(to_texts([row for _, _, row in thrice], tokenizer), references)
    assert score == pytest.approx([sum(scores[::3]) / 3, sum(scores) / 9])


def test_a_rouge_l_that_is_0_everywhere_is_warned_of(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(DevSet, "loss", lambda self, engine: {"ce": 1.5, "correct": 0.5})
    monkeypatch.setattr(DevSet, "rouge_l", lambda self, model, asked: found)
    judge = DevSet((), (), (), None, Decoding(16), 2, seed=1, world=World(0, 1, 0, 1), collate=None)
    student = Student(load_model(str(tiny_model(tmp_path)), torch.float32, CPU))
    for found, warned in ((2.0, False), (0.0, True)):
        score = judge(SimpleNamespace(module=student))
        assert (score.loss, score.rouge_l) == (1.5, found)
        assert ("ROUGE-L is 0 for every dev response; while it is, the loss ranks" in caplog.text) == warned


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
    def offer(self, best, rouge_l, epoch, fail=False, loss=1.0):
        def save(path):
            path.mkdir()
            if fail:
                raise OSError("disk full")
        best.offer(Score(loss, rouge_l), epoch, epoch * 10, save)

    def kept(self, folder):
        return sorted(path.name.split("_")[0] for path in folder.glob("epoch*"))

    def best_of(self, folder, scores, keep=1):
        """The epochs that are kept of (ROUGE-L, loss) by epoch, the best first."""
        best = BestCheckpoints(folder, keep, writes_files=True)
        for epoch, (rouge_l, loss) in enumerate(scores, 1):
            self.offer(best, rouge_l, epoch, loss=loss)
        best.release()
        epochs = [int(entry.name.split("_")[0][5:]) for entry in best.kept]
        assert self.kept(folder) == sorted(f"epoch{epoch}" for epoch in epochs)
        return epochs

    def test_the_best_stay_until_they_are_released(self, tmp_path):
        best = BestCheckpoints(tmp_path, keep=2, writes_files=True)
        for epoch, rouge_l in enumerate([5.0, 3.0, 4.0, 5.0, 9.0], 1):
            self.offer(best, rouge_l, epoch)
        assert self.kept(tmp_path) == [f"epoch{i}" for i in range(1, 6)]  # a state may count on them
        best.release()
        assert self.kept(tmp_path) == ["epoch4", "epoch5"]

    @pytest.mark.parametrize(("scores", "best"), [
        ([(5, 2), (5, 1), (5, 3)], [2, 1]),  # of equal ROUGE-L the lower loss
        ([(0, 3), (0, 2), (0, 1)], [3, 2]),  # also where nothing scores
        ([(5, 1), (5, 1), (5, 1)], [3, 2]),  # of equal losses the later
        ([(None, 1), (None, 1), (None, 2)], [2, 1]),
        ([(5, nan), (5, 9), (5, nan)], [2, 3]),  # what is not a number is worst
        ([(nan, 1), (0, 2), (nan, 0.5)], [2, 3]),
        ([(None, nan), (None, inf), (None, 7), (None, 7.5)], [3, 4]),
        ([(None, nan), (None, nan), (None, nan)], [3, 2]),
        ([(None, 0.5), (3, 9), (None, 0.1)], [2, 3]),  # no ROUGE-L is worse than any
    ])
    def test_the_order(self, tmp_path, scores, best):
        assert self.best_of(tmp_path, scores, keep=2) == best

    def test_entries_of_earlier_versions(self, tmp_path):
        """They had the rank and the name alone, and of equals kept the earlier."""
        best = BestCheckpoints(tmp_path, keep=2, writes_files=False)
        best.kept = Position.from_json({"best": [[5.0, "epoch2_step20_loss2.5000_rougel5.0000"],
                                                 [-math.inf, "epoch1_step10_lossnan"]]}).best
        self.offer(best, 5.0, 3, loss=2.75)
        self.offer(best, 4.0, 4)
        assert [name.split("_")[0] for _, name, _ in best.kept] == ["epoch2", "epoch3"]
        again = Position.from_json(json.loads(json.dumps(dataclasses.asdict(Position(best=best.kept)))))
        best.kept = again.best
        self.offer(best, 5.0, 5, loss=2.6)
        assert [name.split("_")[0] for _, name, _ in best.kept] == ["epoch2", "epoch5"]

    def test_the_log_says_why(self, tmp_path, caplog):
        caplog.set_level("INFO", logger="todi")
        self.best_of(tmp_path, [(5, 2), (4, 1), (5, 3), (5, 1), (5, 1), (9, nan), (nan, 1)])
        assert [line.replace(f"{tmp_path}/", "") for line in caplog.messages] == [
            "saved checkpoint epoch1_step10_loss2.0000_rougel5.0000: there were fewer than 1",
            "checkpoint epoch2_step20_loss1.0000_rougel4.0000 is not kept: epoch1_step10_loss2.0000_rougel5.0000, the "
            "last of the best 1, has a better ROUGE-L",
            "checkpoint epoch3_step30_loss3.0000_rougel5.0000 is not kept: epoch1_step10_loss2.0000_rougel5.0000, the "
            "last of the best 1, has the same ROUGE-L and a better loss",
            "saved checkpoint epoch4_step40_loss1.0000_rougel5.0000: it has the same ROUGE-L and a better loss than "
            "epoch1_step10_loss2.0000_rougel5.0000, which goes",
            "saved checkpoint epoch5_step50_loss1.0000_rougel5.0000: it has the same scores at a later step than "
            "epoch4_step40_loss1.0000_rougel5.0000, which goes",
            "saved checkpoint epoch6_step60_lossnan_rougel9.0000: it has a better ROUGE-L than "
            "epoch5_step50_loss1.0000_rougel5.0000, which goes",
            "checkpoint epoch7_step70_loss1.0000_rougelnan is not kept: epoch6_step60_lossnan_rougel9.0000, the last "
            "of the best 1, has a better ROUGE-L",
        ]

    def test_a_failed_save_leaves_the_older_ones(self, tmp_path):
        best = BestCheckpoints(tmp_path, keep=1, writes_files=True)
        self.offer(best, 1.0, 1)
        with pytest.raises(StorageError, match=f"cannot write {tmp_path}/epoch2.*disk full"):
            self.offer(best, 2.0, 2, fail=True)
        assert [path.name.split("_")[0] for path in tmp_path.iterdir()] == ["epoch1"]

    def test_folder_names(self):
        assert Score(1.5).folder_name(2, 30) == "epoch2_step30_loss1.5000"
        assert Score(1.5, 20.25).folder_name(2, 30) == "epoch2_step30_loss1.5000_rougel20.2500"
