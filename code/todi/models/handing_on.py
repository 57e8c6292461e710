"""What a checkpoint has for others: the files that are handed on, whose licences hold, and which programs take it.

What cannot be run here is told by what is in the files: the class that config.json names, the names and shapes of the
weights, a tokenizer that needs no code.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from todi.errors import InputError, collecting
from todi.models.checks import check_vocabulary
from todi.models.loading import check_weights, load_config, load_tokenizer

CARD, ADAPTER = "README.md", "adapter_config.json"
_HANDED_ON = {".json", ".safetensors", ".txt", ".model", ".jinja", ".md"}  # no pickles, no code
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# model_type of a configuration -> architecture of a GGUF file, where the names differ
_IN_GGUF = {"gemma3_text": "gemma3", "gemma2_text": "gemma2"}


@dataclass(frozen=True)
class Taker:
    """A program, whether it takes a checkpoint as it is, and how, or why not."""

    program: str
    takes: bool
    how: str


def handed_on(folder: Path) -> list[Path]:
    """The files of a checkpoint that are handed on: not its responses in eval/, nothing that runs."""
    return sorted(file for file in folder.iterdir()
                  if file.is_file() and file.suffix in _HANDED_ON and not file.name.startswith("."))


def licence_files(base: Path) -> list[Path]:
    """The texts of the licence that lie beside a base model."""
    return sorted({file for pattern in _LICENCES for file in base.glob(pattern) if file.is_file()})


def licence_of(card: str) -> str | None:
    """The licence that a model card's front matter names, in the Hub's words."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    named = front and re.search(r"^license: *(\S+)$", front[1], re.MULTILINE)
    return named[1] if named else None


def takers(folder: Path) -> list[Taker]:
    """Who takes a checkpoint, a model or a LoRA adapter.

    Raises:
        InputError: nobody can: what is missing or does not fit, all of it.
    """
    return _of_adapter(folder) if (folder / ADAPTER).is_file() else _of_model(folder)


def _of_model(folder: Path) -> list[Taker]:
    problems: list[str] = []
    with collecting(problems):
        config = load_config(str(folder))
    with collecting(problems):
        tokenizer = load_tokenizer(str(folder))
    if not problems:
        with collecting(problems):
            check_vocabulary(config, tokenizer, str(folder))
        with collecting(problems):
            check_weights(str(folder))
    if not list(folder.glob("model*.safetensors")):
        problems.append(f"{folder} has no model*.safetensors")
    if problems:
        raise InputError(problems)
    described = _json(folder / "config.json")
    name = ", ".join(described.get("architectures") or ())
    code = "auto_map" in described
    whole = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    architecture = _IN_GGUF.get(config.model_type, config.model_type)
    in_gguf = architecture in gguf.MODEL_ARCH_NAMES.values()
    return [
        Taker("transformers, lm-evaluation-harness", not code, "AutoModelForCausalLM, --model hf" if not code else
              "config.json asks for code of its own (auto_map)"),
        Taker("vLLM", bool(name) and whole and not code,
              f"vllm serve, where its version has {name}" if name else "config.json names no architectures"),
        Taker("llama.cpp", in_gguf and whole,
              f"convert_hf_to_gguf.py makes a GGUF file of it, architecture {architecture}" if in_gguf else
              f"GGUF files have no architecture {architecture}"),
    ]


def _of_adapter(folder: Path) -> list[Taker]:
    described = _json(folder / ADAPTER)
    problems = [f"{folder} has no {name}" for name in ("adapter_model.safetensors", "tokenizer_config.json")
                if not (folder / name).is_file()]
    if described.get("peft_type") != "LORA":
        problems.append(f"{folder / ADAPTER}: peft_type is {described.get('peft_type')!r}, expected 'LORA'")
    if problems:
        raise InputError(problems)
    rank, more = described["r"], described.get("modules_to_save") or described.get("use_dora")
    return [
        Taker("peft, lm-evaluation-harness", True, "PeftModel.from_pretrained, --model_args peft="),
        Taker("vLLM", not more, f"--enable-lora --max-lora-rank {rank}" if not more else
              "it has more than the two matrices of a layer (modules_to_save, DoRA)"),
        Taker("llama.cpp", not more, "convert_lora_to_gguf.py" if not more else "as vLLM"),
    ]


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
