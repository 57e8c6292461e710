"""Layers through torch.compile train as they do without, and text is written without."""

import pytest
import torch
from launching import exhaustive, in_tiers, slow
from tiny import ARCHITECTURES, tiny_model
from todi.data.batches import collate
from todi.data.tokenize import Example
from todi.errors import InputError
from todi.generation.decoding import Decoding, generate
from todi.models.adapters import add_lora
from todi.models.backbone import backbone_and_head
from todi.models.compiling import compile_layers
from todi.models.families import family_of
from todi.models.loading import load_model
from todi.models.packing import use_packing
from todi.options import parse
from todi.settings import TrainConfig
from todi.training.train_inputs import read_inputs
from torch._dynamo.utils import counters

LENGTHS = [(5, 9), (4, 4, 13), (20, 2), (7,)]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def built(path, family: str, lora: bool = False) -> torch.nn.Module:
    model = load_model(str(tiny_model(path, family)), torch.float32, torch.device("cpu"))
    if lora:
        torch.manual_seed(0)
        model = add_lora(model, family_of("auto", family), rank=4, alpha=8, dropout=0.0)
    assert use_packing(model, "student")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def trained(model: torch.nn.Module) -> list[torch.Tensor]:
    """Hidden states and gradients of packed micro-batches, each of another shape."""
    found, backbone = [], backbone_and_head(model)[0]
    numbers = torch.Generator().manual_seed(0)
    for lengths in LENGTHS:
        examples = [Example(tuple(torch.randint(5, 60, (length,), generator=numbers).tolist()), 1, i)
                    for i, length in enumerate(lengths)]
        model.zero_grad()
        hidden = backbone(**collate(examples, 0, packed=True).inputs, use_cache=False).last_hidden_state
        (hidden * torch.randn(hidden.shape, generator=numbers)).sum().backward()
        found += [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


def check(model: torch.nn.Module, backend: str) -> None:
    expected = trained(model)
    compile_layers(model, "student", backend)
    for ours, theirs in zip(trained(model), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert 0 < graphs() < 16  # not one for each shape and layer


@pytest.mark.parametrize("family", in_tiers(ARCHITECTURES, slowly=["llama"]))
def test_trains_as_without(family, tmp_path):
    check(built(tmp_path, family), "aot_eager")


@pytest.mark.exhaustive
def test_with_lora(tmp_path):
    check(built(tmp_path, "llama", lora=True), "aot_eager")


@pytest.mark.parametrize("family", [slow("llama"), exhaustive("gpt2")])
def test_by_the_compiler_itself(family, tmp_path):
    check(built(tmp_path, family), "inductor")


@pytest.mark.slow
def test_text_is_written_without(tmp_path):
    model = built(tmp_path, "llama")
    compile_layers(model, "student", "aot_eager")
    decoding = Decoding(max_length=24, max_new_tokens=8, do_sample=False)
    generate(model, [[5, 6, 7], [8, 9]], [1, 2], decoding=decoding, eos_ids={0}, pad_id=0, batch_size=2)
    assert graphs() == 0
    trained(model)
    assert graphs() > 0


def test_it_is_refused_with_what_cannot_be_compiled():
    words = ["--model-path", "student", "--criterion", "cross_entropy", "--compile"]
    with pytest.raises(InputError, match="--compile and --gradient-checkpointing: give one of them"):
        read_inputs(parse(TrainConfig, [*words, "--gradient-checkpointing"]), torch.device("cpu"))
    with pytest.raises(InputError, match="--compile and --loss-terms: give one of them"):
        read_inputs(parse(TrainConfig, [*words, "--loss-terms", "hidden_states=0.1"]), torch.device("cpu"))
    with pytest.raises(InputError, match="--compile needs ZeRO stage 0, 1 or 2"):
        read_inputs(parse(TrainConfig, [*words, "--zero-stage", "3"]), torch.device("cpu"))
