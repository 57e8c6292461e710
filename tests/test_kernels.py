"""The fused kernel without a GPU: interpreted beside its eager twin, and compiled ahead of time; and who runs when."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import CASES, DTYPES, Case, task_of
from launching import exhaustive, slow
from todi.criterions import HeadRows, LinearHead, build_divergence, distillation_loss, kernels
from todi.criterions.kernels import MAKERS, choose_rows
from todi.criterions.rows import eager_rows
from todi.errors import InputError
from todi.settings import KERNELS
from torch.testing import assert_close

ROOT = Path(__file__).parents[1]
# of the fused kernel to its twin; where rows are peaked, log p - log q is so large that its last digit counts
SUMS, GRADIENTS, PEAKED = 2e-6, 2e-7, 2e-6
# the interpreter cuts digits off where a GPU rounds: a whole unit of the last place
LAST_PLACE = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


def in_a_process(script: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'code'}:{ROOT / 'tests'}", **environment}
    run = subprocess.run([sys.executable, ROOT / "tests" / script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return json.loads(in_a_process("interpreted.py", TRITON_INTERPRET="1"))


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_is_its_twin(interpreted, name):
    case, found = CASES[name], interpreted["cases"][name]
    assert found["sums"] <= SUMS
    if case.wants_gradients:
        rounding = 0 if case.dtype == "fp32" else LAST_PLACE[case.dtype] * found["largest"]
        assert found["gradients"] <= (PEAKED if case.spread / case.temperature > 2 else GRADIENTS) + rounding
    assert found["zero"] == (case.unlabelled == case.rows)


def test_the_check_passes_the_kernel_and_no_other(interpreted):
    checks = interpreted["checks"]
    assert set(checks["fused_rows"].values()) == {None}
    for name in DTYPES:
        assert "gradients differ" in checks["wrong_rows"][name]
        assert checks["failing_rows"][name] == "it failed with RuntimeError: no kernel image is available"


@pytest.mark.slow
def test_compiled_for_gpus(tmp_path):
    """A change of the kernel that costs registers, spills or narrow loads shows in the table."""
    made = in_a_process("compiled.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert made in (ROOT / "docs" / "performance.md").read_text(), f"docs/performance.md has another table than\n{made}"


# ---- who runs

@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as the choice goes: what is chosen runs on the CPU."""
    monkeypatch.setattr(kernels, "_why_no_triton", lambda dtype, task: None)


def other_rows(*args):
    """A row function that agrees with the eager one."""
    return eager_rows(*args)


def wrong_rows(logits, *args):
    """One that does not."""
    sums = eager_rows(logits, *args)
    return sums * 1.01


def test_the_settings_name_what_there_is():
    assert tuple(MAKERS) == KERNELS
    with pytest.raises(ValueError, match="kernels must be auto, triton, compile, eager, got 'cuda'"):
        choose_rows("cuda", torch.float32, task_of(Case()))


@pytest.mark.parametrize("name", ["ToDi", None])
def test_auto_is_eager_on_a_cpu_and_says_so_once(caplog, name):
    caplog.set_level("INFO", "todi")
    for _ in range(2):
        assert choose_rows("auto", torch.float32, task_of(Case(name))) is eager_rows
    assert caplog.messages == ["loss: the eager row function (the device is no GPU but cpu) for "
                               f"{name or 'cross-entropy'}, float32 on cpu"]


def test_triton_is_refused_on_a_cpu():
    with pytest.raises(InputError, match="KERNELS=triton: the device is no GPU but cpu"):
        choose_rows("triton", torch.float32, task_of(Case()))


def test_auto_takes_a_kernel_that_agrees(monkeypatch, caplog, on_a_gpu):
    caplog.set_level("INFO", "todi")
    monkeypatch.setattr(kernels, "_fused_rows", lambda: other_rows)
    assert choose_rows("auto", torch.bfloat16, task_of(Case(holes=0.5))) is other_rows
    assert "the fused Triton kernel (it agrees" in caplog.text and not [r for r in caplog.records if r.levelno > 20]


def test_auto_warns_of_one_that_does_not_and_goes_on(monkeypatch, caplog, on_a_gpu):
    monkeypatch.setattr(kernels, "_fused_rows", lambda: wrong_rows)
    assert choose_rows("auto", torch.float32, task_of(Case())) is eager_rows
    assert "the fused Triton kernel is not used: its sums differ from those of the eager one by up to" in caplog.text


def test_what_the_kernel_is_not_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which stands in for a GPU
    assert kernels._why_no_triton(torch.float32, task_of(Case())) is None
    assert kernels._why_no_triton(torch.float64, task_of(Case())) == "it has no kernel for torch.float64"
    warm = dataclasses.replace(task_of(Case()), temperature=torch.ones(3, 1))
    assert kernels._why_no_triton(torch.float32, warm) == "it has no kernel for rows with temperatures of their own"
    assert choose_rows("auto", torch.float64, task_of(Case())) is choose_rows("auto", torch.float32, warm) is eager_rows
    monkeypatch.setattr("todi.criterions.triton_points.POINTS", {})
    assert kernels._why_no_triton(torch.float32, task_of(Case())) == "it has no kernel for the divergence ToDi"
    assert kernels._why_no_triton(torch.float32, task_of(Case(None))) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels._why_no_triton(torch.float32, task_of(Case())) == "the package triton is not installed"


def check_compiled(name: str | None, temperature: float | torch.Tensor = 1.0) -> None:
    """The compiled row function gives the sums and gradients of the eager one, and has been compiled."""
    torch._dynamo.reset()  # past a number of variants of a function all others are silently eager
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(301, 5, requires_grad=True)
    teacher = HeadRows(torch.randn(7, 6), LinearHead(torch.randn(301, 6))) if name else None
    labels = torch.tensor([3, -100, 5, 7, 300, 0, 1])
    results = {}
    for way in ("eager", "compile"):
        sums = distillation_loss(hidden, LinearHead(weight), teacher, labels, temperature=temperature,
                                 divergence=name and build_divergence(name), kernels=way, chunk_size=3)
        results[way] = *sums, *torch.autograd.grad(sums.loss, (hidden, weight))
    assert_close(results["compile"], results["eager"], rtol=1e-5, atol=1e-6)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] > 0 and set(frames) == {"total", "ok"}


@pytest.mark.parametrize("name", ["ToDi", "js_divergence", None,
                                  *map(slow, ("adaptive_kl", "sampled_reverse_kl")),
                                  *map(exhaustive, ("amid", "EOPD", "gkd", "abkd", "amid_qr", "top_k_forward_kl",
                                                    "SE_KD", "skewed_reverse_kl_detached"))])
def test_compiled_twin_is_the_eager_one(name):
    check_compiled(name)


@pytest.mark.slow
def test_compiled_twin_with_a_temperature_for_each_row():
    check_compiled("reverse_kl", torch.linspace(0.5, 2, 7))
