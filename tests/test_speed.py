"""How fast a run says it is, its trace, and the allocator: formulas by hand, counts, and what is written where."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT
from stopping import SPEED
from tiny import tiny_model
from todi.criterions import LinearHead
from todi.data.tokenize import Example
from todi.models.adapters import add_lora
from todi.models.backbone import backbone_and_head
from todi.models.families import FAMILIES
from todi.runtime import peaks
from todi.runtime.allocator import settle_allocator
from todi.runtime.device import settle_tf32
from todi.runtime.distributed import World
from todi.runtime.peaks import Peak, known_peak, peak_of
from todi.runtime.stopwatch import Stopwatch, ThreadClock
from todi.training.speed import Cost, Meter, SpeedMeter, forward_cost, in_words, shares, training_cost
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

ALONE, CPU = World(0, 1, 0, 1), torch.device("cpu")
KD = "gpt2/vanilla_kd_gpt2_base"


def load(folder, family: str, **shape):
    return AutoModelForCausalLM.from_pretrained(tiny_model(folder, family, **shape), attn_implementation="eager")


# --- operations

def test_a_gpt2_counted_by_hand(tmp_path):
    """Two layers of width 32 with four heads of 8; a vocabulary of 300."""
    backbone, head = backbone_and_head(load(tmp_path, "gpt2"))
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128  # attention in and out, the two of the MLP
    assert forward_cost(backbone, head) == Cost(token=2 * 2 * layer, row=2 * 300 * 32, pair=4 * 2 * 32)
    assert training_cost(backbone, head) == Cost(token=6 * 2 * layer, row=6 * 300 * 32, pair=12 * 2 * 32)
    assert forward_cost(None, head) == Cost(row=2 * 300 * 32)


def test_a_llama_with_grouped_queries_counted_by_hand(tmp_path):
    backbone, head = backbone_and_head(load(tmp_path, "llama"))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v of two heads in place of four, the MLP
    assert forward_cost(backbone, head) == Cost(token=2 * 2 * layer, row=2 * 300 * 32, pair=4 * 2 * 32)


def test_torch_counts_the_same(tmp_path):
    """All positions labelled; without a kernel that knows of causality, every position meets every other."""
    backbone, head = backbone_and_head(load(tmp_path, "gpt2").train())
    ids = torch.arange(3, 15)[None]
    for cost, backwards in ((forward_cost(backbone, head), False), (training_cost(backbone, head), True)):
        with FlopCounterMode(display=False) as counter:
            logits = head(backbone(input_ids=ids).last_hidden_state)
            if backwards:
                logits.sum().backward()
        assert counter.get_total_flops() == 12 * cost.token + 12 * cost.row + 12 * 12 * cost.pair


def test_a_frozen_weight_costs_four_and_an_adapter_six(tmp_path):
    model = load(tmp_path, "gpt2")
    frozen = forward_cost(*backbone_and_head(model))
    backbone, head = backbone_and_head(add_lora(model, FAMILIES["gpt2"], rank=4, alpha=8, dropout=0.0))
    adapters = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert adapters > 0
    assert training_cost(backbone, head) == Cost(2 * frozen.token + 6 * adapters, 2 * frozen.row, 3 * frozen.pair)


def test_of_experts_a_token_meets_a_few():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(8))})
            self.config = SimpleNamespace(num_experts=8, num_experts_per_tok=2, num_attention_heads=1, head_dim=4,
                                          num_hidden_layers=1)
    assert forward_cost(Backbone(), LinearHead(torch.zeros(5, 4))) == Cost(2 * 2 * 16, 2 * 5 * 4, 4 * 4)


def test_a_batch_counted_by_hand():
    """Four and two inputs, of which three and one have a label."""
    examples = [Example((1, 2, 3, 4, 5), prompt_length=2), Example((1, 2, 3), prompt_length=2)]
    assert Cost(token=100, row=10, pair=1).of(examples) == 6 * 100 + 4 * 10 + (1 + 2 + 3 + 4) + (1 + 2)
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


# --- peaks

@pytest.mark.parametrize(("name", "dtype", "tf32", "tera"), [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989), ("NVIDIA H100 PCIe", torch.bfloat16, False, 756),
    ("NVIDIA H200 NVL", torch.bfloat16, False, 835), ("NVIDIA GH200 480GB", torch.float16, False, 989),
    ("NVIDIA B200", torch.bfloat16, False, 2250), ("NVIDIA GB200", torch.bfloat16, False, 2500),
    ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156), ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
    ("Tesla V100-SXM2-32GB", torch.float32, True, 15.7), ("Tesla T4", torch.float16, False, 65),
    ("NVIDIA L40", torch.bfloat16, False, 181), ("NVIDIA L4", torch.bfloat16, False, 121)])
def test_a_known_gpu(name, dtype, tf32, tera):
    assert known_peak(name, dtype, tf32).flops == tera * 1e12


@pytest.mark.parametrize(("name", "dtype"), [
    ("Tesla T4", torch.bfloat16), ("Tesla V100-SXM2-32GB", torch.bfloat16), ("NVIDIA A10G", torch.bfloat16),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16), ("Some Other GPU", torch.float32)])
def test_a_peak_that_is_not_known(name, dtype):
    assert known_peak(name, dtype) is None


def test_tf32_is_a_matter_of_gpus():
    assert not torch.backends.cuda.matmul.allow_tf32
    settle_tf32(True, CPU)
    assert not torch.backends.cuda.matmul.allow_tf32
    for wanted in (True, False):
        settle_tf32(wanted, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == wanted


def test_a_cpu_is_probed(monkeypatch):
    """As fast as a product that is timed here, give or take what else this machine does."""
    monkeypatch.setattr(peaks, "_PROBED_SECONDS", 0.1)
    left = torch.ones(512, 512)
    left @ left
    start = time.perf_counter()
    left @ left
    timed = 2 * 512**3 / (time.perf_counter() - start)
    assert timed / 20 < peak_of(CPU, torch.float32).flops < timed * 200


# --- the stopwatch and what is made of it

class Ticks:
    """A clock whose time is set by hand."""

    now = 0.0

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start


def test_a_phase_within_another_counts_for_itself_alone():
    clock = Ticks()
    watch = Stopwatch(clock)
    for _ in range(2):
        with watch.phase("student"):
            clock.now += 1
            with watch.phase("loss"):
                clock.now += 10
            clock.now += 100
        clock.now += 1000
    assert watch.read() == {"student": 202, "loss": 20}
    assert watch.read() == {}


def test_a_phase_ends_with_what_goes_wrong_in_it():
    clock = Ticks()
    watch = Stopwatch(clock)
    with pytest.raises(ValueError, match="wrong"), watch.phase("student"), watch.phase("loss"):
        clock.now += 1
        raise ValueError("wrong")
    with watch.phase("data"):
        clock.now += 1
    assert watch.read() == {"student": 0, "loss": 1, "data": 1}


def test_who_waits_takes_no_time_of_a_cpu():
    watch = Stopwatch(ThreadClock())
    with watch.phase("waits"):
        time.sleep(0.3)
    assert watch.read()["waits"] < 0.1


EXAMPLES = [Example((1, 2, 3, 4, 5), prompt_length=2), Example((1, 2, 3), prompt_length=2)]


def test_what_a_run_says_of_its_speed():
    clock = Ticks()
    meter = SpeedMeter(Stopwatch(clock), Peak(1000.0, "by hand"), ALONE, CPU)
    meter.add_cost(Cost(token=50))
    meter.add_cost(Cost(row=25))
    for plan in meter.each("data", [EXAMPLES, EXAMPLES]):
        clock.now += 1  # not in a phase
        meter.count(plan, positions=8)
        with meter.phase("student"):
            clock.now += 2
    report = meter.report(8.0)
    assert report == {
        "tokens_per_second": 12 / 8, "positions_per_second": 16 / 8, "padding": 0.25, "mfu": 800 / 8 / 1000,
        "seconds_data": 0, "seconds_generation": 0, "seconds_teacher": 0, "seconds_student": 4, "seconds_loss": 0,
        "seconds_optimizer": 0, "seconds_waiting": 4}
    assert in_words(report) == "2 tokens/s, 25% padding, MFU 10%, "
    assert shares(meter.totals) == "student 50%, waiting 50%"
    assert meter.report(1.0)["tokens_per_second"] == 0


def test_ranks_are_taken_together():
    class Twice(World):
        def sum(self, tensor):
            return tensor * 2

    clock = Ticks()
    meter = SpeedMeter(Stopwatch(clock), Peak(1000.0, "by hand"), Twice(0, 2, 0, 2), CPU)
    meter.add_cost(Cost(token=50))
    meter.count(EXAMPLES, positions=8)
    with meter.phase("student"):
        clock.now += 3
    report = meter.report(4.0)
    assert (report["tokens_per_second"], report["mfu"]) == (12 / 4, 600 / 4 / 2000)
    assert (report["seconds_student"], report["seconds_waiting"]) == (3, 1)


def test_a_meter_that_forgets():
    meter = Meter()
    with meter.step(), meter.phase("student"):
        meter.count(EXAMPLES, 8)
    assert list(meter.each("data", [1, 2])) == [1, 2]
    assert meter.report(1.0) == {} and in_words({}) == ""


@pytest.fixture(scope="module")
def traced(workshop):
    models = {"MODEL_PATH": workshop.model("gpt2-student", seed=2),
              "TEACHER_MODEL_PATH": workshop.model("gpt2-teacher", hidden=48, seed=1)}
    return workshop.train(KD, "traced", **models, PROFILE=2, MFU=1, BATCH_SIZE=2, GRAD_ACC=2, EVAL_GEN=0).result()


def test_every_line_says_how_fast_it_goes(traced):
    assert traced.exit_code == 0, traced.output
    for line in traced.metrics("train"):
        assert {*SPEED, "mfu"} <= line.keys()
        assert 0 < line["mfu"] < 1 and 0 <= line["padding"] < 1
        assert line["tokens_per_second"] == pytest.approx(line["positions_per_second"] * (1 - line["padding"]))
        assert min(line[f"seconds_{phase}"] for phase in ("teacher", "student", "loss", "optimizer")) > 0
    assert "peak of the device:" in traced.output and "tokens/s" in traced.output
    assert "time: " in traced.output


def test_a_trace_of_two_steps_is_written(traced):
    events = json.loads((traced.folder / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("cat") == "user_annotation"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert names.count("teacher") == names.count("loss") >= 2  # one for each micro-batch
    assert any(event.get("name") == "aten::addmm" for event in events)


# --- the allocator

WORK = """
import resource, sys, torch
from todi.runtime.allocator import settle_allocator
torch.set_num_threads(1)
print(settle_allocator(sys.argv[1], torch.device("cpu")))
def work():
    for _ in range(5):
        torch.ones(16 << 20).exp().sum()  # 64 MiB each: by itself glibc learns to keep blocks of up to 32
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
work()
print(min(faults() for _ in range(3)))  # the heap may still grow by a block in one of them
"""


def faults(name: str, **variables: str) -> tuple[str, int]:
    """What is said of the allocator, and page faults of 10 temporaries of 16,384 pages each."""
    done = subprocess.run([sys.executable, "-c", WORK, name], check=True, text=True, stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "code")} | variables)
    said, count = done.stdout.splitlines()
    return said, int(count)


def test_kept_memory_is_not_mapped_again():
    said, kept = faults("glibc")
    assert said == "glibc, keeping what is freed (each step takes the same memory again)"
    given_back = faults("system")[1]
    assert given_back > 10 * 16384 / 16  # 16: where the kernel maps several pages at a fault
    assert kept < given_back / 20


def test_what_a_user_chose_stays():
    said, given_back = faults("glibc", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576")
    assert said == "as GLIBC_TUNABLES has it"
    assert given_back > 10 * 16384 / 16
    assert faults("glibc", MALLOC_TRIM_THRESHOLD_="100000")[0] == "as MALLOC_TRIM_THRESHOLD_ has it"


def test_when_there_is_nothing_to_set(monkeypatch):
    assert settle_allocator("system", CPU) == "as the system has it (asked for)"
    assert settle_allocator("auto", torch.device("cuda")).endswith("(the tensors are not in its memory)")
    with monkeypatch.context() as another:
        another.setenv("LD_PRELOAD", "/lib/first.so:/lib/libjemalloc.so.2")
        assert settle_allocator("auto", CPU) == "as /lib/libjemalloc.so.2 has it"
    monkeypatch.delenv("LD_PRELOAD", raising=False)

    def no_glibc(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_glibc)
    assert "this is not glibc" in settle_allocator("glibc", CPU)
    assert "takes more memory" in settle_allocator("auto", CPU)


LIBRARY = "/usr/lib/libtcmalloc_minimal.so.4"


@pytest.mark.parametrize(("options", "variables", "loaded"), [
    ("--lr 1", {}, LIBRARY), ("--allocator auto --lr 1", {}, LIBRARY), ("--allocator glibc", {}, ""),
    ("--allocator system --lr 1", {}, ""), ("", {"LD_PRELOAD": ""}, LIBRARY),
    ("", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, ""), ("", {"CUDA_VISIBLE_DEVICES": "0"}, ""),
    ("", {"INSTALLED": "libtcmalloc_minimal_debug.so.4 (libc6) => /usr/lib/libtcmalloc_minimal_debug.so.4"}, "")])
def test_launchers_load_tcmalloc_where_it_is(tmp_path, options, variables, loaded):
    ldconfig = tmp_path / "ldconfig"
    ldconfig.write_text('#!/bin/sh\necho "1 libs found in cache"; echo "\t$INSTALLED"\n')
    ldconfig.chmod(0o755)
    script = f'source scripts/lib/common.sh; options=({options}); choose_allocator; echo "${{LD_PRELOAD:-}}"'
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "bin/python", "CUDA_VISIBLE_DEVICES": "",
                   "INSTALLED": f"libtcmalloc_minimal.so.4 (libc6,x86-64) => {LIBRARY}"} | variables
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True, text=True,
                          stdout=subprocess.PIPE)
    assert done.stdout == f"{loaded}\n"


def test_without_it_they_load_the_environment_s_mimalloc(tmp_path):
    library = tmp_path / "lib" / "python3.12" / "site-packages" / "cmeel.prefix" / "lib" / "libmimalloc.so"
    library.parent.mkdir(parents=True)
    library.touch()
    script = ('ldconfig() { :; }; source scripts/lib/common.sh; options=(); choose_allocator; '
              'echo "$LD_PRELOAD $MIMALLOC_PURGE_DELAY"')
    environment = {"PATH": os.environ["PATH"], "PYTHON": f"{tmp_path}/bin/python", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True, text=True,
                          stdout=subprocess.PIPE)
    assert done.stdout == f"{library} -1\n"


def test_a_library_of_the_user_s_own_stays():
    script = 'source scripts/lib/common.sh; LD_PRELOAD=mine.so; options=(); choose_allocator; echo "$LD_PRELOAD"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE,
                          env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout == "mine.so\n"
