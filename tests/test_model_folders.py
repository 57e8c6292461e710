"""Model folders that cannot be loaded, or not as they were meant: refused in a line, before anything is computed.

What passes the check loads, and is what the whole folder is.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import write_data
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from todi.errors import InputError
from todi.evaluation import eval_inputs
from todi.generation.decoding import stop_ids
from todi.models.inputs import read_model
from todi.models.loading import check_weights, load_model, load_tokenizer
from todi.models.probe import check_model
from todi.runtime.device import choose_precision
from todi.settings import DecodingConfig, EvalConfig
from transformers import AutoModelForCausalLM, GenerationConfig

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2200119864\n"

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FILES = ["config.json", "generation_config.json", "model.safetensors.index.json", *SHARDS, "tokenizer.json",
         "tokenizer_config.json"]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "half of it": lambda data: data[:len(data) // 2],
    "cut off": lambda data: data[:-7],
    "zeros": lambda data: bytes(len(data)),
    "not text": lambda data: b"\xff\xfe{" + data[::-1],
    "a pointer": lambda data: POINTER,
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "a number": lambda data: b"5",
    "an object": lambda data: b"{}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder as it is published: several files of weights, a description of each part."""
    folder = tmp_path_factory.mktemp("whole")
    model = AutoModelForCausalLM.from_pretrained(tiny_model(folder, "llama", vocab=len(tiny_tokenizer(folder))))
    (folder / "model.safetensors").unlink()
    model.generation_config = GenerationConfig(eos_token_id=[0, 5])
    model.save_pretrained(folder, max_shard_size="60KB")
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def check(folder: Path) -> None:
    """As training's inputs are checked."""
    read_model(str(folder), "auto", None, FP32, 64, False)


def load(folder: Path) -> tuple[list, list[int], frozenset[int]]:
    """What is computed with a folder."""
    model, tokenizer = load_model(str(folder), torch.float32, CPU), load_tokenizer(str(folder))
    check_model(model, str(folder))
    logits = model(input_ids=torch.arange(3, 40)[None]).logits
    return logits.tolist(), tokenizer("Write a response.").input_ids, stop_ids(model, tokenizer, [])


class TestFiles:
    @pytest.mark.parametrize("file", FILES)
    def test_each_damaged(self, copy, whole, file):
        for name, damage in DAMAGES.items():
            if (file, name) == ("generation_config.json", "an object"):
                continue  # all of its settings are optional
            (copy / file).write_bytes(damage((whole / file).read_bytes()))
            with pytest.raises(InputError, match=str(copy)):
                check(copy)

    @pytest.mark.parametrize("file", [name for name in FILES if name != "generation_config.json"])
    def test_each_cut_off_after_the_check(self, copy, file):
        check(copy)
        (copy / file).write_bytes((copy / file).read_bytes()[:-7])
        with pytest.raises(InputError, match=str(copy)):
            load(copy)

    @pytest.mark.parametrize("file", [name for name in FILES if name != "generation_config.json"])
    def test_each_not_there(self, copy, file):
        (copy / file).unlink()
        with pytest.raises(InputError, match=str(copy)):
            check(copy)

    @pytest.mark.parametrize("file", ["model.safetensors.index.json", SHARDS[1], "tokenizer.json", "config.json"])
    def test_an_evaluation_checks_the_same(self, copy, tmp_path, file):
        config = EvalConfig(model_path=str(copy), sets_dir=str(write_data(tmp_path / "sets" / "tiny", valid=2).parent),
                            sets=("tiny",), precision="fp32", decoding=DecodingConfig(64, 48))
        eval_inputs.read_inputs(config, CPU)
        (copy / file).write_bytes(POINTER)
        with pytest.raises(InputError, match=f"{copy / file} is a Git LFS pointer, not the file itself"):
            eval_inputs.read_inputs(config, CPU)

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
    def test_values_of_other_kinds(self, copy, whole, file):
        """Any may be refused; what is not runs."""
        settings, refused = json.loads((whole / file).read_text()), 0
        for name in settings:
            for value in (None, "x", -1, 0.5, [], {"a": 1}):
                (copy / file).write_text(json.dumps(settings | {name: value}))
                try:
                    check(copy)
                except InputError:
                    refused += 1
                else:
                    load(copy)
        assert refused > 0


class TestWeights:
    def test_of_another_shape(self, tmp_path):
        config = tiny_model(tmp_path, "llama") / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 308}))
        self.refused(tmp_path, r"has 2 weights of other shapes than its configuration says, the first: lm_head.weight "
                               r"is \(300, 32\), a LlamaForCausalLM needs \(308, 32\)")

    @pytest.mark.parametrize(("layers", "said"), [
        (3, "lacks 9 weights of a LlamaForCausalLM, the first: model.layers.2.input_layernorm.weight"),
        (1, "has 9 weights that a LlamaForCausalLM of its configuration has not, the first: model.layers.1.input"),
    ])
    def test_of_another_number_of_layers(self, tmp_path, layers, said):
        config = tiny_model(tmp_path, "llama") / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
        self.refused(tmp_path, said)

    def test_biases_that_the_configuration_does_not_know(self, tmp_path):
        config = tiny_model(tmp_path, "llama", attention_bias=True) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_bias": False}))
        self.refused(tmp_path, "has 8 weights that a LlamaForCausalLM of its configuration has not, the first: .*bias")

    def test_emptied_by_zero_3(self, tmp_path):
        file = tiny_model(tmp_path, "llama") / "model.safetensors"
        save_file({name: torch.empty(0) for name in load_file(file)}, file, {"format": "pt"})
        self.refused(tmp_path, r"weights of other shapes than its configuration says, the first: lm_head.weight is \(")

    def test_that_are_no_numbers(self, tmp_path):
        file = tiny_model(tmp_path, "llama") / "model.safetensors"
        save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(InputError, match="its logits are not finite; its weights are damaged, or too large for fp"):
            check_model(load_model(str(tmp_path), torch.float32, CPU), "tiny")

    def test_a_pickle_gives_its_tensors_and_nothing_else(self, tmp_path):
        file = tiny_model(tmp_path, "llama") / "model.safetensors"
        tensors = load_file(file)
        file.unlink()
        pickled = tmp_path / "pytorch_model.bin"
        torch.save(tensors, pickled)
        check_weights(str(tmp_path))
        assert all(torch.equal(tensor, tensors[name])
                   for name, tensor in load_model(str(tmp_path), torch.float32, CPU).state_dict().items())
        torch.save(tensors | {"run": Path.unlink}, pickled)
        self.refused(tmp_path, "it is no PyTorch file, or holds more than tensors, and those alone are read")
        pickled.write_bytes(pickled.read_bytes()[:5000])
        self.refused(tmp_path, "cannot read ModelForCausalLM")

    @staticmethod
    def refused(folder: Path, said: str) -> None:
        """By the check and when it is loaded, in the same words."""
        for read in (check_weights, lambda path: load_model(path, torch.float32, CPU)):
            with pytest.raises(InputError, match=said):
                read(str(folder))


class TestPackages:
    def test_code_that_asks_for_one_that_is_not_there(self, copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(
            config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
        (copy / "mine.py").write_text("import no_such_package\nfrom transformers import LlamaConfig as Config\n")
        with pytest.raises(InputError, match="no_such_package"):
            read_model(str(copy), "auto", None, FP32, 64, True)
        with pytest.raises(InputError, match="cannot read Config of"):
            check(copy)  # nobody said that the code may run

    def test_quantised_weights(self, copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(
            config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}))
        with pytest.raises(InputError, match="cannot read ModelForCausalLM of .*"):
            check(copy)

    def test_a_sentencepiece_file_alone(self, copy, monkeypatch):
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
        for missing in ("is_sentencepiece_available", "is_protobuf_available"):
            with monkeypatch.context() as patched:
                patched.setattr(f"todi.models.loading.{missing}", lambda: False)
                with pytest.raises(InputError, match=r"a SentencePiece file alone \(tokenizer.model\), .* pip install "
                                                     "sentencepiece protobuf"):
                    load_tokenizer(str(copy))
