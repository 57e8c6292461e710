"""The check before a run: memory by arithmetic, disk space, and what it says."""

import logging
from types import SimpleNamespace

import pytest
import torch
from launching import run
from tiny import tiny_model, tiny_tokenizer
from todi.data.tokenize import Example, encode_examples
from todi.doctor import _about_memory, examine
from todi.errors import InputError
from todi.generation.together import prompts_read_together
from todi.models.adapters import add_lora
from todi.models.backbone import backbone_and_head
from todi.models.families import FAMILIES
from todi.models.inputs import ModelInputs
from todi.models.loading import empty_model, load_config, load_model
from todi.options import parse
from todi.runtime.device import Precision
from todi.runtime.distributed import World
from todi.settings import TrainConfig
from todi.teacher.spread import held_numbers
from todi.training import memory
from todi.training.estimate import estimate_memory, student_shape, texts_at_a_time
from todi.training.memory import (
    Memory,
    Shape,
    State,
    measure_shape,
    offload,
    peak,
    peak_on_cpu,
    training_state,
)
from todi.training.prefill import LiveBytes, prefill_bytes
from todi.training.train_inputs import TrainInputs, read_inputs

CPU = torch.device("cpu")


def shape(trained: int, width: int, parameters: int = 1000) -> Shape:
    return Shape(parameters, trained, width, activations=0, vocabulary=10, hidden=4, head_trained=True)


@pytest.mark.parametrize(("width", "stage", "ranks", "expected"), [
    # bytes per parameter: weights, gradients, fp32 master and Adam's moments, fp32 gradients of the step
    (4, 0, 1, (4, 4, 8, 0)),
    (2, 0, 4, (2, 2, 12, 4)),
    (2, 1, 4, (2, 2, 3, 1)),
    (2, 2, 4, (2, 0.5, 3, 1)),
    (2, 3, 4, (0.5, 0.5, 3, 1)),
    (4, 1, 1, (4, 4, 12, 4)),
])
def test_bytes_of_a_parameter(width, stage, ranks, expected):
    assert training_state(shape(1000, width), stage, ranks) == State(*(int(1000 * size) for size in expected))


def test_an_adapter_has_gradients_and_moments_of_its_own_weights_alone():
    assert training_state(shape(10, 2), 1, 1) == State(weights=2000, gradients=20, optimizer=120, step=40)


@pytest.mark.parametrize(("zero", "on_device", "moved"), [
    ({"stage": 2}, State(10, 20, 30, 40), 0),
    ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, State(10, 20, 0, 0), 70),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, State(10, 0, 0, 0), 70),
    ({"stage": 3, "offload_param": {"device": "cpu"}}, State(0, 20, 30, 40), 10),
    ({"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "cpu"}}, State(10, 0, 0, 0), 70),
])
def test_what_is_offloaded_is_not_on_the_device(zero, on_device, moved):
    assert offload(State(weights=10, gradients=20, optimizer=30, step=40), zero) == (on_device, moved)


def test_the_fuller_moment_counts():
    state = State(weights=10, gradients=20, optimizer=30, step=40)
    fixed = {"teacher": 5, "base": 1}
    long = peak(state, forward=100, accumulates=True, **fixed)
    assert long == Memory(base=1, teacher=5, weights=10, gradients=20, optimizer=30, working=100)
    assert peak(state, forward=100, accumulates=False, **fixed).total == long.total - 20
    assert peak(state, forward=50, accumulates=False, **fixed).total == 6 + 10 + 20 + 30 + 40


def test_on_a_cpu_both_moments_add_up_and_leave_something_behind():
    state = State(weights=10, gradients=20, optimizer=30, step=40)
    for width, left_behind in ((4, 25), (2, 75)):
        assert peak_on_cpu(state, forward=100, width=width, teacher=5, base=1).total == 206 + left_behind


class TestShape:
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    @pytest.mark.parametrize("family", ["gpt2", "qwen2.5", "gemma3"])
    def test_it_is_what_a_real_forward_keeps(self, tmp_path, family, lora):
        path = str(tiny_model(tmp_path, FAMILIES[family].architecture))
        real, empty = load_model(path, torch.float32, CPU), empty_model(load_config(path), dtype=torch.float32)
        if lora:
            real, empty = (add_lora(model, FAMILIES[family], 4, 8, 0.1) for model in (real, empty))
        measured = measure_shape(empty, samples=2, length=30, device=CPU)
        assert measured.parameters == real.num_parameters()
        assert measured.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
        assert (measured.vocabulary, measured.hidden, measured.head_trained) == (300, 32, not lora)
        assert measured.activations == kept_bytes(real.train())

    def test_checkpointing_keeps_little(self, tmp_path):
        model = empty_model(load_config(str(tiny_model(tmp_path, "llama", layers=8))), dtype=torch.float32)
        whole, checkpointed = (measure_shape(model, 2, 30, CPU, checkpointing).activations
                               for checkpointing in (False, True))
        assert checkpointed == whole // 8 + 8 * 2 * 30 * 32 * 4


    def test_a_mixture_of_experts_has_a_rule_of_thumb(self, tmp_path, caplog):
        model = empty_model(load_config(str(tiny_model(tmp_path, "mixtral", layers=3))), dtype=torch.float32)
        assert measure_shape(model, 2, 30, CPU).activations == 3 * 17 * 2 * 30 * 32 * 4
        assert caplog.text == ""


class TestPrefill:
    """What reading prompts takes, where the student writes."""

    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    @pytest.mark.parametrize("family", ["gpt2", "gemma3"])
    def test_it_is_what_a_real_forward_takes(self, tmp_path, family, lora):
        path = str(tiny_model(tmp_path, FAMILIES[family].architecture))
        real, empty = load_model(path, torch.float32, CPU), empty_model(load_config(path), dtype=torch.float32)
        if lora:
            real, empty = (add_lora(model, FAMILIES[family], 4, 8, 0.1) for model in (real, empty))
        ids = torch.zeros(3, 30, dtype=torch.long)
        with torch.no_grad(), LiveBytes() as count:
            mask = torch.ones_like(ids).triu()
            backbone_and_head(real.eval())[0](input_ids=ids, attention_mask=mask, use_cache=False)
        logits = 3 * 300 * 4
        assert prefill_bytes(empty, 3, 30, CPU) == pytest.approx(count.peak + logits, rel=0.02)

    def test_only_what_lives_at_a_time_counts(self, tmp_path):
        """Much less than what a backward needs, whatever the number of layers; twice as much of twice the prompts."""
        few, many = (empty_model(load_config(str(tiny_model(tmp_path / str(layers), "llama", layers=layers))),
                                 dtype=torch.float32) for layers in (2, 8))
        assert prefill_bytes(few, 4, 50, CPU) == prefill_bytes(many, 4, 50, CPU)
        assert prefill_bytes(many, 4, 50, CPU) < measure_shape(many, 4, 50, CPU).activations / 4
        assert prefill_bytes(few, 8, 50, CPU) == pytest.approx(2 * prefill_bytes(few, 4, 50, CPU), rel=0.05)
        assert prefill_bytes(few, 4, 50, CPU) > 4 * 50 * few.config.intermediate_size * 4 * 2  # gate and up

    def test_live_bytes(self):
        given = torch.ones(1000)
        with LiveBytes() as count:
            view = given[:10]  # made before
            one = given * 2
            other = one + 1
            del one
            another = other * 3
        assert (count.live, count.peak, view.numel()) == (8000, 8000, 10)
        del other, another
        assert count.live == 0

    def test_a_mixture_of_experts_has_a_rule_of_thumb(self, tmp_path):
        model = empty_model(load_config(str(tiny_model(tmp_path, "mixtral", layers=3))), dtype=torch.float32)
        assert prefill_bytes(model, 2, 30, CPU) == 17 * 2 * 30 * 32 * 4 + 2 * 300 * 4

    def test_a_forward_that_fails_has_it_too_and_says_so(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("todi"), "propagate", True)
        model = empty_model(load_config(str(tiny_model(tmp_path, "llama"))), dtype=torch.float32)
        model.model.layers[0].mlp.down_proj = torch.nn.Linear(7, 32, device="meta")
        assert prefill_bytes(model, 2, 30, CPU) == 17 * 2 * 30 * 32 * 4 + 2 * 300 * 4
        assert "is by a rule of thumb: a forward without numbers fails (" in caplog.text

    @pytest.mark.parametrize(("words", "read"), [
        ([], 4), (["--eval-gen-repeat-times", "9"], 32), (["--no-eval-gen"], 0), (["--eval-batch-size", "3"], 3),
        (["--no-eval-gen", "--samples", "student", "--sample-batch-size", "40"], 32)])
    def test_how_many_are_read_together(self, tmp_path, words, read):
        config = parse(TrainConfig, words)
        student = SimpleNamespace(config=load_config(str(tiny_model(tmp_path, "llama"))),
                                  precision=Precision("fp32", "test"))
        inputs = SimpleNamespace(student=student, dev=[None] * 4)
        assert prompts_read_together(texts_at_a_time(config, inputs), student.config) == read

    def test_it_is_part_of_the_estimate(self, tmp_path, monkeypatch):
        """Where the student writes, and it takes more than training does."""
        monkeypatch.setattr("todi.training.estimate.prefill_bytes", lambda *_: 10**12)
        model = tiny_model(tmp_path, "llama")
        student = ModelInputs(str(model), load_config(str(model)), FAMILIES["tinyllama"], None,
                              Precision("fp32", "test"), None)
        inputs = TrainInputs(student, [], None, {"zero_optimization": {"stage": 1}}, [], [], [], [], [], "")
        examples = [Example(tuple(range(20)), 5, 0)]
        for words, much in (([], True), (["--no-eval-gen"], False)):
            config = parse(TrainConfig, ["--criterion", "cross_entropy", *words])
            shape = student_shape(config, inputs, 19, CPU)
            needed = estimate_memory(config, inputs, shape, examples, World(0, 1, 0, 1), CPU)
            assert (needed.working > 10**12) == much


def kept_bytes(model: torch.nn.Module) -> int:
    """What autograd keeps of a forward over padded texts, weights apart."""
    backbone, _ = backbone_and_head(model)
    owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}
    ids = torch.zeros(2, 30, dtype=torch.long)

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone(input_ids=ids, attention_mask=torch.ones_like(ids).tril(28), use_cache=False)
        assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class TestReport:
    @pytest.fixture
    def settings(self, workshop, tmp_path) -> list[str]:
        student, teacher = workshop.model("doctor student", family="llama"), workshop.model(
            "doctor teacher", family="llama", hidden=48, vocab=320)
        return ["--model-path", str(student), "--teacher-model-path", str(teacher), "--data-dir", str(workshop.data),
                "--precision", "fp32", "--save-dir", str(tmp_path / "run"), "--max-length", "64",
                "--max-prompt-length", "48"]

    def examine(self, settings, ranks: int = 1):
        config = parse(TrainConfig, settings)
        inputs = read_inputs(config, CPU)
        data, student = config.data, inputs.student
        examples = encode_examples(inputs.train, student.tokenizer, student.family, data.max_length,
                                   data.max_prompt_length)
        return examine(config, inputs, examples, World(0, ranks, 0, ranks), CPU)

    def test_all_is_well(self, settings):
        report = self.examine(settings)
        assert report.warnings == []
        assert report.facts[0].startswith("memory: about ")
        assert "teacher 0.00" in report.facts[0]
        assert report.facts[1].startswith("disk: up to ")

    def test_fewer_tokens_at_a_time(self, settings):
        needed = Memory(base=0, teacher=0, weights=2**30, gradients=2**30, optimizer=2**30, working=4 * 2**30)
        warnings = [_about_memory(needed, parse(TrainConfig, [*settings, *words]), 1, 5 * 2**30, 100)[1][0]
                    for words in ([], ["--packing", "off"])]
        assert "use --max-tokens 200, or" in warnings[0]  # half the working memory of 4 x 100
        assert "use a smaller --batch-size than 4" in warnings[1]

    def test_too_little_memory_and_disk_space(self, settings, monkeypatch):
        monkeypatch.setattr("todi.doctor.available_bytes", lambda device, processes: -memory.resident_bytes())
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        full, lora = (self.examine([*settings, *words]).warnings for words in (
            [], ["--peft", "lora", "--batch-size", "1", "--gradient-checkpointing", "--zero-stage", "3"]))
        assert "a smaller --batch-size than 4" in full[0]
        assert "--peft lora, or more devices with --zero-stage 3" in full[0]
        assert full[1].endswith("make room, choose another --save-dir, or keep fewer than 1 checkpoints")
        assert lora[0].endswith("use a smaller --max-length")

    def test_a_teacher_is_spread_where_it_does_not_fit(self, settings, monkeypatch):
        monkeypatch.setattr("todi.teacher.spread._AHEAD", 0)
        for free, wanted, ranks, spread in ((2**40, "auto", 8, False), (0, "auto", 8, True), (0, "off", 8, False),
                                            (2**40, "on", 8, True), (0, "auto", 1, False)):
            monkeypatch.setattr("todi.doctor.available_bytes", lambda device, processes, free=free: free)
            report = self.examine([*settings, "--teacher-zero", wanted], ranks)
            assert report.teacher_spread == spread, (free, wanted, ranks)
        monkeypatch.setattr("todi.doctor.available_bytes", lambda device, processes: 0)
        facts = self.examine(settings, 8).facts
        assert facts[0].startswith("teacher: spread over 8 ranks: a device needs ") and facts[1].startswith("memory: ")

    def test_the_share_of_a_spread_teacher(self, workshop, monkeypatch):
        """The head, half of the rest, and the largest weight once more."""
        monkeypatch.setattr("todi.teacher.spread._AHEAD", 0)
        model = load_model(str(workshop.model("doctor teacher", family="llama", hidden=48, vocab=320)), torch.float32,
                           CPU)
        backbone, head = backbone_and_head(model)
        sizes = [weight.numel() for weight in backbone.parameters()]
        assert held_numbers(model, 2) == head.weight.numel() + sum(sizes) // 2 + max(sizes)

    def test_offloading(self, settings, tmp_path, monkeypatch):
        """Of a GPU, whose shapes are measured here without one."""
        monkeypatch.setattr("todi.training.estimate.measure_shape",
                            lambda model, samples, length, device, checkpointing:
                            measure_shape(model, samples, length, CPU, checkpointing))
        monkeypatch.setattr("todi.training.estimate.prefill_bytes", lambda *_: 0)
        monkeypatch.setattr("todi.doctor.available_bytes", lambda device, processes: 0)
        file = tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
        config = parse(TrainConfig, [*settings, "--deepspeed_config", str(file)])
        inputs = read_inputs(config, CPU)
        examples = encode_examples(inputs.train, inputs.student.tokenizer, inputs.student.family, 64, 48)
        report = examine(config, inputs, examples, World(0, 1, 0, 1), torch.device("cuda"))
        assert "optimizer" not in report.facts[0]
        assert report.facts[1].startswith("offloaded: about ")
        assert report.warnings[1].startswith("offloading needs about ")

    def test_the_teacher_may_not_be_fp16_on_a_cpu(self, settings):
        with pytest.raises(InputError, match="--teacher-dtype fp16 does not train on a CPU"):
            self.examine([*settings, "--teacher-dtype", "fp16"])
        assert self.examine([*settings, "--teacher-dtype", "bf16"]).warnings == []

    def test_everything_that_does_not_fit_is_said_at_once(self, settings, workshop, tmp_path):
        other = workshop.model("doctor teacher", family="llama", hidden=48, vocab=320)
        adapted = add_lora(load_model(str(other), torch.float32, CPU), FAMILIES["tinyllama"], 4, 8, 0.1)
        adapted.save_pretrained(tmp_path)
        tiny_model(tmp_path / "short", "llama", vocab=100)
        tiny_tokenizer(tmp_path / "short")
        words = dict(zip(settings[::2], settings[1::2], strict=True)) | {
            "--teacher-model-path": str(tmp_path / "short"), "--peft": "lora", "--peft-path": str(tmp_path),
            "--model-type": "lama", "--max-length": "600"}
        with pytest.raises(InputError) as caught:
            self.examine([word for pair in words.items() for word in pair])
        said = "\n".join(caught.value.problems)
        for problem in ("unknown model family 'lama'",
                        f"the LoRA adapter at {tmp_path} was made for another model than",
                        f"{tmp_path / 'short'} has 100 vocabulary entries, but its tokenizer has",
                        f"--max-length is 600, but {tmp_path / 'short'} has 512 positions"):
            assert problem in said

    def test_by_the_launcher(self, settings, workshop, tmp_path):
        done = run("smollm2/vanilla_kd_smollm2", DOCTOR=1, NPROC=2, SAVE_DIR=tmp_path / "run", PEFT="lora",
                   MODEL_PATH=settings[1], TEACHER_MODEL_PATH=settings[3], DATA_DIR=workshop.data)
        assert done.returncode == 0, done.stdout
        assert "memory: about" in done.stdout
        assert "nothing is wrong" in done.stdout
        assert not (tmp_path / "run").exists()
        done = run("smollm2/vanilla_kd_smollm2", "--lr", "-1", DOCTOR=1, MODEL_PATH=settings[1],
                   TEACHER_MODEL_PATH=tmp_path, DATA_DIR=workshop.data)
        assert done.returncode == 2
        assert "--lr must be above 0" in done.stdout
        assert f"cannot read Config of {tmp_path}" in done.stdout
