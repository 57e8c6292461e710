"""Nothing in a training step waits for the device: tensors without numbers refuse whoever wants to read one."""

import contextlib

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from todi.criterions import DIVERGENCES, DistillationCriterion, build_divergence
from todi.data.batches import Batch, collate
from todi.data.tokenize import Example
from todi.models.loading import load_model
from todi.models.packing import ATTENTION
from todi.teacher.live import LiveTeacher
from todi.training.student import Student

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Of which the meta device knows nothing."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *words, **options: contextlib.nullcontext())


@pytest.fixture
def batch() -> Batch:
    return collate([Example(tuple(range(5, 15)), 3, 0), Example(tuple(range(5, 25)), 3, 1)], 0, packed=True).to(META)


def model_of(path, family: str) -> torch.nn.Module:
    model = load_model(str(tiny_model(path, family)), torch.bfloat16, torch.device("cpu"), attention=ATTENTION)
    return model.to(META)


def step(batch: Batch, student: torch.nn.Module, teacher: torch.nn.Module, objective: str) -> torch.Tensor:
    """Forward and backward of a micro-batch, as training does them."""
    criterion = DistillationCriterion(build_divergence(objective))
    sums, _ = Student(student)(batch, criterion, LiveTeacher(teacher).rows(batch))
    (sums["loss"] / 7).backward()
    return sums["loss"]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_packed_models(tmp_path, batch, family):
    student, teacher = (model_of(tmp_path / name, family) for name in ("student", "teacher"))
    assert step(batch, student, teacher, "ToDi").device == META
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_every_objective(tmp_path, batch, objective):
    student, teacher = (model_of(tmp_path / name, "llama") for name in ("student", "teacher"))
    assert step(batch, student, teacher, objective).device == META


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero,
                                  torch.Tensor.__bool__])
def test_a_read_would_be_seen(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(2, device=META).sum())
