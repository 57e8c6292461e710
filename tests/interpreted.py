"""The fused kernel in Triton's interpreter beside its eager twin, as JSON: how far they are apart in each case.

It is a process of its own, for TRITON_INTERPRET=1 must be there before Triton is imported.
"""

import dataclasses
import json
from dataclasses import dataclass, field

import torch
from todi.criterions.definitions import build_divergence
from todi.criterions.kernels import disagreement
from todi.criterions.rows import IGNORE_INDEX, RowTask, eager_rows
from torch.nn import functional

EIGHT = ("forward_kl", "reverse_kl", "js_divergence", "tvd", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl",
         "ToDi")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Rows of random logits. Attributes: unlabelled: rows without a label; holes: share of the teacher's entries that
    are -inf; masked: entries that no model gives; padding: numbers between the rows, which are NaN."""

    name: str | None = "ToDi"
    params: dict[str, float] = field(default_factory=dict)
    rows: int = 3
    vocabulary: int = 2501
    dtype: str = "fp32"
    spread: float = 4
    temperature: float = 2.0
    kd_rate: float = 0.5
    label_smoothing: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    unlabelled: int = 0
    holes: float = 0
    masked: int = 0
    padding: int = 0
    wants_gradients: bool = True


CASES = {
    **{name: Case(name) for name in EIGHT},
    **{f"{name}-peaked": Case(name, spread=24) for name in EIGHT},
    **{f"{name}-{dtype}": Case(name, dtype=dtype) for name in EIGHT for dtype in ("bf16", "fp16")},
    **{f"{name}-holes": Case(name, holes=0.9) for name in EIGHT},
    "ToDi-beta": Case("ToDi", {"beta": 2.5}), "ToDi-moved": Case("ToDi_scheduled", {"beta_start": 2.5}),
    "skewed_forward_kl-0.7": Case("skewed_forward_kl", {"skew_lambda": 0.7}),
    "skewed_reverse_kl-0.7": Case("skewed_reverse_kl", {"skew_lambda": 0.7}),
    "adaptive_kl-0.2": Case("adaptive_kl", {"alpha": 0.2}),
    "cross-entropy": Case(None, kd_rate=0), "cross-entropy-smoothed": Case(None, kd_rate=0, label_smoothing=0.1),
    "odd": Case(vocabulary=37), "one-row": Case(rows=1), "one-block": Case(vocabulary=1024),
    "no-label": Case(unlabelled=3), "some-labels": Case(unlabelled=2), "temperature-1": Case(temperature=1.0, spread=2),
    "temperature-0.7": Case(temperature=0.7, spread=2), "divergence-alone": Case(kd_rate=1.0),
    "head": Case(softcap=30.0, scale=0.3, label_smoothing=0.1), "masked": Case(masked=100, label_smoothing=0.1),
    "masked-head": Case(masked=100, softcap=30.0, holes=0.5), "padded": Case(padding=63),
    "padded-smoothed": Case("adaptive_kl", padding=15, label_smoothing=0.1),
    "no-gradient": Case(wants_gradients=False),
}


def task_of(case: Case) -> RowTask:
    divergence = case.name and build_divergence(case.name, **case.params)
    masked = torch.zeros(case.vocabulary, dtype=torch.bool) if case.masked else None
    if case.masked:
        masked[5::case.vocabulary // case.masked] = True
    return RowTask(divergence, case.temperature, case.kd_rate, case.label_smoothing, case.softcap, case.scale,
                   case.vocabulary, masked, case.holes > 0, torch.float32, torch.device("cpu"), case.wants_gradients)


def compared(case: Case) -> dict[str, float]:
    """Largest differences from the twin in float64: of the sums, relative to these, and of the gradients; and whether
    all are exactly zero. In float32 the twin rounds more often than the kernel does."""
    from todi.criterions.triton_rows import fused_rows

    generator, task, shape = torch.Generator().manual_seed(0), task_of(case), (case.rows, case.vocabulary)
    student, teacher = (case.spread * torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for _ in range(2))
    if case.softcap:
        student = case.softcap * (student / case.softcap).tanh()
    teacher[torch.rand(shape, generator=generator) < case.holes] = -torch.inf
    labels = torch.randint(5, shape[:1], generator=generator)
    labels[0] = student[0].argmax()
    labels[case.rows - case.unlabelled:] = IGNORE_INDEX
    student[labels == IGNORE_INDEX], teacher[labels == IGNORE_INDEX] = torch.nan, torch.inf
    twin, twin_teacher = student.double(), None if case.name is None else teacher.double()
    student, teacher = (functional.pad(side, (0, case.padding), value=torch.nan)[:, :case.vocabulary]
                        for side in (student, teacher))
    sums = fused_rows(student, None if case.name is None else teacher, labels, task)
    wanted = eager_rows(twin, twin_teacher, labels, dataclasses.replace(task, dtype=torch.float64))
    difference = {"sums": ((sums - wanted).abs() / wanted.abs().clamp_min(1e-6)).max().item(),
                  "zero": not sums.any() and not student.any()}
    if case.wants_gradients:
        difference["gradients"] = (student - twin).abs().max().item()
        difference["largest"] = twin.abs().max().item()
    return difference


def wrong_rows(logits, teacher_logits, labels, task):
    """A row function whose gradients are a twentieth too large."""
    sums = eager_rows(logits, teacher_logits, labels, task)
    logits.mul_(1.05)
    return sums


def failing_rows(logits, teacher_logits, labels, task):
    raise RuntimeError("no kernel image is available")


def main() -> None:
    from todi.criterions.triton_rows import fused_rows

    task = dataclasses.replace(task_of(CASES["ToDi-holes"]))
    checks = {rows.__name__: {name: disagreement(rows, dtype, task) for name, dtype in DTYPES.items()}
              for rows in (fused_rows, wrong_rows, failing_rows)}
    print(json.dumps({"cases": {name: compared(case) for name, case in CASES.items()}, "checks": checks}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
