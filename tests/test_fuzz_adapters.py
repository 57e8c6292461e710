"""--check-only and the run agree on adapters: whatever is wrong with one, what passes the check runs."""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from launching import in_ten_thousand_tries
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_adapters import MERGED, save_adapter
from tiny import tiny_model
from todi.criterions import DistillationCriterion
from todi.data.batches import collate
from todi.data.tokenize import Example
from todi.errors import InputError
from todi.models.adapters import check_adapter, load_adapter, merge_adapter
from todi.models.loading import load_config, load_model
from todi.models.probe import check_model
from todi.training.checkpoints import save_model
from todi.training.optimizer import build_optimizer
from todi.training.student import Student

CPU = torch.device("cpu")
BATCH = collate([Example((1, 2, 3, 4, 5), 2, 0), Example((7, 8, 9), 1, 1)], 0)

BASES = {"untied": {"family": "llama", "attention_bias": True},
         "tied": {"family": "llama", "tie_word_embeddings": True}, "biases": {"family": "qwen2"},
         "gpt2": {"family": "gpt2"}}
GPT2 = {"plain": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        "all linear layers": {"target_modules": "all-linear"},
        "saved embeddings and head": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}}
VALUES = st.sampled_from([
    None, True, False, 0, 1, 4, -1, 2**40, 10**20, 0.5, 1.0, float("nan"), float("inf"), "", "4", "0.5", "true", "all",
    "none", "lora_only", "q_proj", "all-linear", ".*", "(", "lm_head", "CAUSAL_LM", "SEQ_CLS", "LORA", "gaussian",
    "pissa", "layers", [], ["q_proj"], ["q_proj", "v_proj"], ["c_attn"], ["nowhere"], ["lm_head"], ["embed_tokens"],
    ["norm"], ["wte"], [0], [1], [7], [None], [["q_proj"]], {}, {"q_proj": 8}, {"q_proj": "8"}, {"q_proj": 0},
    {"q_proj": 2.5}, {"(": 2}, {"v_proj": float("nan")}, {"v_proj": 1e300}])
KEYS = st.sampled_from(sorted({*vars(LoraConfig()), "base_model_name_or_path", "twist"} - {"peft_type"}))
TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "gone": lambda tensor: None,
    "empty": lambda tensor: torch.empty(0),
    "transposed": lambda tensor: tensor.t().contiguous() if tensor.ndim == 2 else tensor[None],
    "shorter": lambda tensor: tensor[1:].clone(),
    "flat": lambda tensor: tensor.flatten(),
    "not a number": lambda tensor: tensor.float() * torch.nan,
    "without end": lambda tensor: tensor.float() / 0,
    "large": lambda tensor: tensor.float() * 1e30,
    "zero": torch.zeros_like,
    **{str(dtype): lambda tensor, dtype=dtype: tensor.to(dtype)
       for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool,
                     torch.complex64, torch.float8_e4m3fn)}}
NAMES: dict[str, Callable[[str], str]] = {
    "another adapter's": lambda name: name.replace(".weight", ".default.weight"),
    "without prefix": lambda name: name.removeprefix("base_model.model."),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "of another layer": lambda name: name.replace("layers.1", "layers.2").replace("h.1", "h.2"),
    "of another module": lambda name: name.replace("q_proj", "k_proj").replace("c_attn", "c_proj"),
    "A is B": lambda name: name.replace("lora_A", "lora_C").replace("lora_B", "lora_A").replace("lora_C", "lora_B")}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:len(data) * 2 // 3], "a byte short": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a flipped byte": lambda data: data[:40] + bytes(byte ^ 1 for byte in data[40:41]) + data[41:],
    "zeros": lambda data: bytes(len(data)), "nothing": lambda data: b""}
TENSOR = st.integers(0, 20)  # its place among the sorted names; beyond the last, all of them
SET = st.tuples(st.just("set"), KEYS, VALUES)
CHANGES = st.lists(st.one_of(
    SET, SET, SET, st.tuples(st.just("remove"), KEYS),
    st.tuples(st.just("tensors"), st.sampled_from(sorted(TENSORS)), TENSOR),
    st.tuples(st.just("names"), st.sampled_from(sorted(NAMES)), TENSOR),
    st.tuples(st.sampled_from(["weights", "config"]), st.sampled_from(sorted(BYTES))),
    st.tuples(st.just("pickle"))), max_size=3)


class Adapters:
    """Sound adapters of every kind, of models of several, and what the damaged ones do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.models = {name: tiny_model(folder / name, **shape) for name, shape in BASES.items()}
        self.loaded = {name: load_model(str(path), torch.float32, CPU) for name, path in self.models.items()}
        self.configs = {name: load_config(str(path)) for name, path in self.models.items()}
        self.counts: Counter[str] = Counter()
        for name, path in self.models.items():
            for kind, lora in (GPT2 if name == "gpt2" else MERGED).items():
                save_adapter(path, folder / f"{name}, {kind}", **lora)
        self.sound = sorted(path.name for path in folder.glob("*, *"))

    def damaged(self, sound: str, changes: list[tuple]) -> Path:
        """A copy of an adapter with these changes."""
        path = self.folder / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder / sound, path)
        described, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
        config, tensors = json.loads(described.read_text()), load_file(weights)
        for what, *how in changes:
            if what == "set":
                config[how[0]] = how[1]
            elif what == "remove":
                config.pop(how[0], None)
            elif what == "tensors":
                tensors = changed(tensors, how[1], lambda name, tensor, way=how[0]: (name, TENSORS[way](tensor)))
            elif what == "names":
                tensors = changed(tensors, how[1], lambda name, tensor, way=how[0]: (NAMES[way](name), tensor))
        described.write_text(json.dumps(config))
        save_file(tensors, weights, {"format": "pt"})
        if ("pickle",) in changes:
            weights.unlink()
            weights = weights.with_suffix(".bin")
            torch.save(tensors, weights)
        for what, *how in changes:
            if what in ("weights", "config"):
                file = {"weights": weights, "config": described}[what]
                file.write_bytes(BYTES[how[0]](file.read_bytes()))
        return path

    def attempt(self, sound: str, changes: list[tuple], trained: bool) -> None:
        """What passes the check runs: a step with the adapter, or the model that it is merged into."""
        base, adapter = sound.partition(", ")[0], str(self.damaged(sound, changes))
        what = "gone on with" if trained else "merged"
        try:
            check_adapter(adapter, self.configs[base], str(self.models[base]), trained=trained)
        except InputError as refused:
            assert all(len(problem.splitlines()) == 1 for problem in refused.problems)
            self.counts["refused"] += 1
            return
        model = copy.deepcopy(self.loaded[base])
        if trained:
            self.train(load_adapter(model, adapter), base)
        else:
            merged = merge_adapter(model, adapter)
            check_model(merged, adapter)
        self.counts[what] += 1

    def train(self, model: torch.nn.Module, base: str) -> None:
        """A step; what is saved afterwards is an adapter that can be gone on with."""
        check_model(model, "the adapter", trained=True)
        student = Student(model)
        optimizer = build_optimizer(student, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, clip_grad=1.0,
                                    stage=0)
        sums, _ = student(BATCH, DistillationCriterion())
        (sums["loss"] / sums["tokens"]).backward()
        optimizer.step()
        shutil.rmtree(self.folder / "saved", ignore_errors=True)
        save_model(model, SimpleNamespace(save_pretrained=lambda folder: None), self.folder / "saved", "", True)
        check_adapter(str(self.folder / "saved"), self.configs[base], str(self.models[base]), trained=True)


def changed(tensors: dict[str, torch.Tensor], which: int, how: Callable) -> dict[str, torch.Tensor]:
    """`how` done to one tensor, or to all of them."""
    names = sorted(tensors)
    chosen = names if which >= len(names) else [names[which]]
    pairs = [how(name, tensor) if name in chosen else (name, tensor) for name, tensor in tensors.items()]
    return {name: tensor for name, tensor in pairs if tensor is not None}


def try_adapters(folder: Path, examples: int, first: int = 0) -> Counter[str]:
    """How many were refused by the check, and how many of the others ran to their end."""
    adapters = Adapters(folder)

    @seed(first)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(adapters.sound), CHANGES, st.booleans())
    def attempt(sound: str, changes: list[tuple], trained: bool) -> None:
        adapters.attempt(sound, changes, trained)

    attempt()
    return adapters.counts


def test_an_adapter_that_passes_the_check_runs(tmp_path):
    counts = try_adapters(tmp_path, 80)
    assert counts["gone on with"] > 5 and counts["merged"] > 5 and counts["refused"] > 5


@in_ten_thousand_tries
def test_an_adapter_that_passes_the_check_runs_in_ten_thousand_tries(first, tmp_path):
    counts = try_adapters(tmp_path, 1000, first)
    print("counts", counts)
    assert counts["gone on with"] > 50 and counts["merged"] > 50
