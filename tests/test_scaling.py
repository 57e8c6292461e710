"""A run on other machines, by arithmetic: compared with what DeepSpeed's engine sends and holds in real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, exhaustive, slow
from reading import unread
from todi.errors import InputError
from todi.options import parse
from todi.runtime.distributed import World
from todi.runtime.peaks import GPU_NAMES, known_board
from todi.settings import DoctorConfig
from todi.simulation_inputs import read_simulation
from todi.simulation_tables import memory_table, report
from todi.training.forecast import Pace, forecast
from todi.training.gpu_memory import (
    CONTEXT,
    HOLES,
    NCCL_BETWEEN_NODES,
    communication_buffers,
    reaching_over,
    with_what_a_gpu_adds,
)
from todi.training.memory import Memory, Shape
from todi.training.rank_zero import duties
from todi.training.traffic import Collective, Links, host_bytes, step_traffic

GIB = 2**30
WAYS = ("0", "1", "1 bf16", "1 lora", "2", "3", "3 bf16", "3 lora", "3 again", "3 small")
TOLERANCE = 0.02  # padding: each rank has as many numbers as the others
SENT = ("all-reduce", "all-gather", "reduce-scatter")
LARGEST = 300 * 64 * 4  # bytes of the largest tensor in fp32: at stage 2 a rank keeps those whole that it has a part of


@pytest.fixture(scope="module")
def tiny(workshop) -> Path:
    return workshop.model("spread", family="llama", layers=4, hidden=64)


def spread(tiny: Path, folder: Path, ranks: int, fake: bool = False) -> dict[str, dict]:
    """What tests/spread.py prints, by way, from so many processes, or from the first of those that are not there."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if not fake else []
    more = {"PYTHONPATH": f"{ROOT / 'code'}:{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    more |= {"FAKE": str(ranks)} if fake else {"STATES": str(folder)}
    done = subprocess.run([sys.executable, *torchrun, ROOT / "tests" / "spread.py", tiny, *WAYS], cwd=folder, text=True,
                          env=environment(more), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("COUNTED ")]
    return {found["way"]: found for found in (json.loads(line.removeprefix("COUNTED ")) for line in lines)}


@pytest.fixture(scope="module")
def counted(tiny, tmp_path_factory):
    """By number of processes: the ways; 32 of them are not there."""
    made = {}

    def count(ranks: int) -> dict[str, dict]:
        if ranks not in made:
            made[ranks] = spread(tiny, tmp_path_factory.mktemp("states"), ranks, fake=ranks > 4)
        return made[ranks]
    return count


@pytest.mark.parametrize("ranks", [exhaustive(1), slow(2), exhaustive(4), 32])
def test_what_deepspeed_sends_and_holds(counted, ranks):
    for way, found in counted(ranks).items():
        assert found["ranks"] == ranks
        for name, said in found["said"].items():
            real = found["counted"].get(name, 0)
            if name in SENT and ranks == 1:  # ZeRO-3 and the weights of the others need nobody to gather from
                assert real <= said * (1 + TOLERANCE) + 100, (way, name)
            elif (way, name) == ("2", "gradients"):
                assert said <= real + 1000 and real <= said + 2 * LARGEST, (way, name, real, said)
            else:
                assert real == pytest.approx(said, rel=TOLERANCE, abs=1000), (way, name)


@pytest.mark.slow
def test_the_first_rank_holds_less_with_more_ranks(counted):
    """Real files and real tensors: nothing of its grows with the world."""
    few, many = counted(2), counted(32)
    for way in WAYS:
        for name in ("weights", "gradients", "optimizer"):
            assert many[way]["counted"][name] <= few[way]["counted"][name], (way, name)
    assert many["3"]["counted"]["optimizer"] < few["3"]["counted"]["optimizer"] / 15


def test_the_files_of_a_state(counted):
    """What the first of two ranks writes is what is said of it, but for some 25 kB of names and settings."""
    for way, stage, width in (("1", 1, 4), ("1 bf16", 1, 2), ("3", 3, 4)):
        files, listed = counted(2)[way]["files"]
        assert listed == {name: size for name, size in files.items() if name != "state.json"}, way
        own = sum(size for name, size in files.items() if "mp_rank_00" in name and "pp_rank_1_" not in name)
        shape = Shape(137_280, 137_280, width, 0, 300, 64, True)
        said = next(one for one in duties(shape, [], stage=stage, ranks=2, dev_responses=0, disk=1e9)
                    if one.what.startswith("its own part"))
        assert said.bytes < own < said.bytes * 1.02 + 40_000, way


def test_of_the_first_ranks_duties_only_those_grow_that_say_so():
    shape = Shape(10**9, 10**9, 2, 0, 32000, 2048, True)
    for stage in (1, 3):
        small, large = (duties(shape, [10**10], stage=stage, ranks=ranks, dev_responses=10**3, disk=1e9)
                        for ranks in (32, 1024))
        for before, after in zip(small, large, strict=True):
            assert (after.bytes > before.bytes) == before.grows, before
        assert sum(one.bytes for one in large if one.grows) < 10**6


class TestGpuMemory:
    """DeepSpeed's defaults: a bucket is 5e8 numbers."""

    SHAPE = Shape(10**10, 10**10, 2, 0, 1000, 1000, True)

    def buffers(self, shape=SHAPE, ranks=32, **zero) -> float:
        return communication_buffers(shape, zero, ranks) / GIB

    def test_buckets(self):
        bucket = 10**9 / GIB
        assert bucket == pytest.approx(0.93, abs=0.01)
        assert self.buffers(stage=1) == pytest.approx(2 * bucket)  # and the flat copy
        assert self.buffers(stage=2, overlap_comm=True) == pytest.approx(3 * bucket)
        assert self.buffers(stage=1, contiguous_gradients=False) == pytest.approx(bucket)
        assert self.buffers(stage=2, reduce_bucket_size=10**6) == pytest.approx(2 * bucket / 500)
        assert self.buffers(stage=0) == pytest.approx(bucket)
        small = Shape(1000, 1000, 4, 0, 10, 10, True)
        assert self.buffers(small, stage=1) == pytest.approx(2 * bucket, rel=1e-3)  # allocated in full, in fp32

    def test_a_rank_by_itself_sends_nothing(self):
        assert self.buffers(stage=1, ranks=1) == 0 < self.buffers(stage=1, ranks=1, contiguous_gradients=True)

    def test_gathered_weights(self):
        """Half of max_reuse_distance, what is fetched ahead, the embedding; of a small model all of it at most."""
        bucket = 10**9 / GIB
        assert self.buffers(stage=3) == pytest.approx(2 * bucket + 2 * (5e8 + 5e7 + 1e6) / GIB)
        assert self.buffers(stage=3, stage3_max_reuse_distance=0) == pytest.approx(2 * bucket + 2 * 5.1e7 / GIB)
        small = Shape(10**6, 1000, 2, 0, 100, 100, True, sizes=(999_000, 1000))
        assert self.buffers(small, stage=3) == pytest.approx(bucket + (2 * 1000 + 2 * 10**6) / GIB)

    def test_in_all(self):
        zero = {"stage": 1}
        memory = Memory(base=0, teacher=GIB, weights=GIB, gradients=0, optimizer=0, working=GIB)
        found = with_what_a_gpu_adds(memory, self.SHAPE, zero, World(0, 32, 0, 8))
        held = 3 * GIB + communication_buffers(self.SHAPE, zero, 32)
        assert (found.base, found.nccl, found.holes) == (CONTEXT, NCCL_BETWEEN_NODES, round(held * HOLES))
        assert found.total == held + CONTEXT + NCCL_BETWEEN_NODES + found.holes
        assert with_what_a_gpu_adds(memory, self.SHAPE, zero, World(0, 1, 0, 1)).nccl == 0

    def test_stage_2_keeps_whole_gradients(self):
        shape = Shape(100, 100, 2, 0, 10, 10, True, sizes=(60, 40))
        assert reaching_over(shape, {"stage": 2}, 4) == 2 * 60
        assert reaching_over(shape, {"stage": 2}, 2) == 2 * 50
        assert reaching_over(shape, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, 4) == 0
        assert reaching_over(shape, {"stage": 1}, 4) == 0


class TestTraffic:
    def test_a_ring(self):
        parts = [Collective(kind, "", 320, False) for kind in ("all-reduce", "all-gather", "reduce-scatter")]
        assert [part.sent(32) for part in parts] == [620, 310, 310]
        assert [part.sent(1) for part in parts] == [0, 0, 0]

    def test_one_in_eight_leaves_the_machine(self):
        links = Links(nodes=4, gpus=8, link=100, network=50)
        assert links.shares(800) == (700, 100)
        assert links.seconds(800) == 16  # eight GPUs send 100 each through one network
        alone = Links(nodes=1, gpus=8, link=100, network=50)
        assert (alone.shares(800), alone.seconds(800)) == ((800, 0), 8)

    def test_offloading(self):
        shape = Shape(100, 80, 2, 0, 10, 10, True)
        cpu = {"device": "cpu"}
        assert host_bytes(shape, {"stage": 1}, 3, 4) == 0
        assert host_bytes(shape, {"stage": 1, "offload_optimizer": cpu}, 3, 4) == 2 * 40  # out and in
        assert host_bytes(shape, {"stage": 2, "offload_optimizer": cpu}, 3, 4) == 4 * 40
        assert host_bytes(shape, {"stage": 3, "offload_param": cpu, "stage3_max_reuse_distance": 0}, 3, 4) == 6 * 50

    def test_stage_2_sends_gradients_of_each_micro_batch(self):
        shape = Shape(100, 80, 2, 0, 10, 10, True)
        assert [[part.payload for part in step_traffic(shape, {"stage": stage}, 3)] for stage in (0, 1, 2)] == [
            [160], [160, 160], [480, 160]]


def test_hours():
    pace = Pace(peak=1000, mfu=0.5, links=Links(1, 2, link=10, network=1), host=20)
    traffic = [Collective("all-gather", "", 1000, overlapped=True), Collective("all-gather", "", 40, overlapped=False)]
    found = forecast(36, 10_000, traffic, to_host=20, pace=pace)
    assert found.computing == 10  # 10,000 over 2 x 1,000 x 0.5
    assert found.exposed == (50 - 10) + 2 + 1  # 500 sent beside the computing, 20 after it, 20 to the host
    assert found.hours == 36 * 53 / 3600


def test_gpus():
    for name in GPU_NAMES:
        assert known_board(name).peak(torch.float16).flops > 10**13
    assert known_board("H100").memory == 80 * GIB and known_board("NVIDIA A100-SXM4-40GB").memory == 40 * GIB
    assert known_board("Voodoo 2") is None


class TestCommand:
    @pytest.fixture
    def words(self, tmp_path, workshop) -> list[str]:
        """Of models that are a configuration each."""
        for name, hidden in (("student", 32), ("teacher", 48)):
            model = workshop.model(f"simulated {name}", family="llama", hidden=hidden)
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text((model / "config.json").read_text())
        lengths = ["--train-samples", "1000", "--prompt-tokens", "20", "--response-tokens", "30"]
        return ["--nodes", "4", "--gpus", "8", "--model-path", str(tmp_path / "student"), "--teacher-model-path",
                str(tmp_path / "teacher"), *lengths, "--max-length", "100", "--max-prompt-length", "50"]

    def simulate(self, words):
        return read_simulation(parse(DoctorConfig, words))

    def test_it_says_everything(self, words):
        text = report(self.simulate(words))
        assert "nothing was run: 4 x 8 = 32 H100, by data sheet 80 GiB, 989 TFLOP/s in bf16" in text
        assert "assumed: an MFU of 40% (--assumed-mfu)" in text
        assert "80 steps x (" in text  # 4 of 256 samples, 20 times
        for stage in ("1", "2", "3"):
            for teacher in ("live", "cached"):
                assert [line for line in text.splitlines() if line.startswith(f"| {stage} ")
                        and f"| {teacher} " in line]

    def test_from_data(self, words, workshop, tmp_path):
        model = workshop.model("simulated student", family="llama", hidden=32)
        at = words.index("--train-samples")
        words = [*words[:at], *words[at + 6:], "--data-dir", str(workshop.data)]
        words[words.index("--model-path") + 1] = str(model)
        found = self.simulate(words)
        assert found.text.samples == 18 and "18 samples of" in report(found)

    def test_micro_batches_hold_so_many_tokens(self, words):
        assert self.simulate(words).micro_batches == 1  # 8 x 49 tokens a rank, 4 x 99 in each
        assert self.simulate([*words, "--max-tokens", "100"]).micro_batches == 4
        assert self.simulate([*words, "--packing", "off"]).micro_batches == 2
        full, small = (self.simulate([*words, *more]) for more in ([], ["--max-tokens", "99"]))
        assert small.shape.activations < full.shape.activations / 3

    def test_a_deepspeed_file_wins(self, words, tmp_path):
        file = tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true, "reduce_bucket_size": 1000}}')
        found = self.simulate([*words, "--deepspeed_config", str(file)])
        assert {one.stage for one in found.variants} == {2}
        over = max(found.shape.sizes) * 2
        assert found.memory(found.variants[0]).buffers == 3 * 1000 * 2 + over
        assert found.traffic(found.variants[0])[0].overlapped

    def test_each_part_shrinks_as_it_should(self, words):
        found = self.simulate(words)
        memory = {(str(one), one.cached): found.memory(one) for one in found.variants}
        assert memory["3", False].weights == memory["1", False].weights // 32
        assert memory["2", False].gradients <= memory["1", False].gradients // 32
        assert memory["1 + optimizer", False].optimizer == 0 < memory["1 + optimizer", False].offloaded
        assert memory["1", True].teacher < memory["1", False].teacher
        assert "| no " not in memory_table(found)

    @pytest.mark.parametrize(("more", "problem"), [
        (["--gpu", "Voodoo"], "--gpu must be one of B200, H200"),
        (["--gpu", "V100", "--precision", "bf16"], "--precision bf16: V100 has no such products"),
        (["--prompt-tokens", "90"], "are more than --max-length 100"),
        (["--assumed-mfu", "2"], r"--assumed-mfu must be in \(0, 1\], got 2"),
        (["--model-path", "nowhere/at/all"], "no model at nowhere/at/all"),
    ])
    def test_what_is_wrong(self, words, more, problem):
        with pytest.raises(InputError, match=problem):
            self.simulate([*words, *more])

    def test_what_is_not_given(self, words):
        with pytest.raises(InputError, match="--nodes 4 needs --gpus"):
            self.simulate([words[0], words[1], *words[4:]])
        at = words.index("--response-tokens")
        with pytest.raises(InputError, match="give all three, or none and a --data-dir"):
            self.simulate([*words[:at], *words[at + 2:]])

    @pytest.mark.slow
    def test_by_its_name(self, words):
        done = subprocess.run([sys.executable, "-m", "todi.doctor", *words], text=True, capture_output=True,
                              env=environment({"PYTHONPATH": ROOT / "code"}), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "What the first rank does alone" in done.stdout


def test_every_setting_is_read_and_explained():
    modules = [file.read_text() for file in (ROOT / "code" / "todi").rglob("*.py") if "settings" not in file.parts]
    declarations = (ROOT / "code" / "todi" / "settings" / "simulation.py").read_text()
    assert not [name for name in unread(DoctorConfig, modules, declarations) if name.startswith("ClusterConfig")]


def test_the_page_is_what_the_benchmark_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from scaling import INTRODUCTION, PAIRS, section

    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page.startswith(INTRODUCTION)
    assert section(PAIRS[0]) in page
    assert all(f"## {pair.title}\n" in page for pair in PAIRS)
