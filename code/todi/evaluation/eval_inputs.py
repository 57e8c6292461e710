"""The settings of an evaluation, and everything that it reads before any weights are loaded."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.chat import render
from todi.data.records import Record, load_records
from todi.errors import InputError, collecting
from todi.evaluation.results import is_set_name
from todi.generation.decoding import Decoding
from todi.models.checks import check_adapter, check_positions, check_vocabulary
from todi.models.families import Family, family_of
from todi.models.loading import find_adapter, load_config, load_tokenizer
from todi.options import option
from todi.runtime.device import Precision, choose_precision
from todi.settings import PRECISIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """Scores a checkpoint by ROUGE-L on instruction sets, over several sampling seeds."""

    model_path: str | None = option(None, "a model folder, a GGUF file, or a Hub name; an adapter names its own")
    peft_path: str | None = option(None, "a LoRA adapter, merged into --model-path or into the base that it names")
    trust_remote_code: bool = option(False, "run code that comes with a model; only for models you trust")
    data_dir: str = option("data", "folder with a folder for each set")
    sets: tuple[str, ...] = option(("dolly", "self-inst", "vicuna", "sinst/11_", "uinst/11_"),
                                   "sets to score; one that is not there is named and skipped")
    limit: int | None = option(None, "use only the first so many records of each set")
    seeds: tuple[int, ...] = option((10, 20, 30, 40, 50), "sampling seeds; greedy takes the first alone")
    batch_size: int = option(16, "responses written together")
    max_length: int = option(512, "longest prompt + response, in tokens")
    max_new_tokens: int = option(256, "longest response, in tokens")
    max_prompt_length: int = option(256, "longest prompt, in tokens; the rest of it is cut off")
    do_sample: bool = option(True, "sample; else greedy or beam search")
    num_beams: int = option(1, "beams of the beam search, with --no-do-sample")
    temperature: float = option(1.0, "sampling temperature")
    top_p: float = option(1.0, "sample from the smallest set of tokens with this mass; 1 is off")
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off")
    no_repeat_ngram_size: int = option(6, "n-grams of this size may occur once only; 0 is off")
    precision: str = option("auto", "compute precision; auto asks the device", choices=PRECISIONS)
    save_dir: str | None = option(None, "folder for eval/; the checkpoint's own when not given")
    check_only: bool = option(False, "check all input, then stop before any weights are loaded")

    @property
    def decoding(self) -> Decoding:
        return Decoding(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Decoding)})

    @property
    def streams(self) -> tuple[int, ...]:
        """The seeds that make a difference."""
        return self.seeds if self.do_sample else self.seeds[:1]

    @property
    def folder(self) -> Path:
        """Where eval/ goes."""
        return Path(self.save_dir or self.peft_path or self.model_path)

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        if not (self.model_path or self.peft_path):
            yield "--model-path or --peft-path is required"
        elif not (self.save_dir or self.peft_path or Path(self.model_path).is_dir()):
            yield f"--save-dir is required: {self.model_path} is no folder that results could go to"
        for name in ("sets", "seeds"):
            values = getattr(self, name)
            if not values:
                yield f"--{name} needs at least one"
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated:
                yield f"--{name}: {', '.join(repeated)} given more than once"
        for name in self.sets:
            if not is_set_name(name):
                yield f"--sets: {name!r} is not the plain name of a folder below --data-dir"
        yield from self._bad_numbers()

    def _bad_numbers(self) -> Iterator[str]:
        for name, least in (("limit", 1), ("batch_size", 1), ("max_new_tokens", 1), ("max_prompt_length", 1),
                            ("top_k", 0), ("no_repeat_ngram_size", 0), ("num_beams", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"--{name.replace('_', '-')} must be at least {least}, got {value}"
        if self.max_prompt_length >= self.max_length:
            yield (f"--max-prompt-length ({self.max_prompt_length}) must be below --max-length "
                   f"({self.max_length}), or no room is left for a response")
        if self.do_sample and self.num_beams > 1:
            yield f"--num-beams {self.num_beams} needs --no-do-sample"
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            yield f"--temperature must be above 0, got {self.temperature}"
        if not 0 < self.top_p <= 1:
            yield f"--top-p must be in (0, 1], got {self.top_p}"


@dataclass(frozen=True)
class Inputs:
    """What was read, short of weights. `model_path` is --model-path or the adapter's own base."""

    model_path: str
    family: Family
    tokenizer: Tokenizer
    precision: Precision
    sets: dict[str, list[Record]]


def read_inputs(config: EvalConfig, device: torch.device) -> Inputs:
    """Everything that `config` names, short of weights.

    Raises:
        InputError: with every problem of settings, paths and data.
    """
    problems = list(config.problems())
    model_path = family = tokenizer = precision = sets = None
    with collecting(problems):
        precision = choose_precision(config.precision, device)
    if config.model_path or config.peft_path:
        with collecting(problems):
            model_path = config.model_path or _base_model(config.peft_path)
            model_config = load_config(model_path, config.trust_remote_code)
            if config.peft_path:
                check_adapter(config.peft_path, model_config, model_path, config.trust_remote_code)
            family = family_of("auto", model_config.model_type)
            tokenizer = load_tokenizer(model_path, config.trust_remote_code)
            check_vocabulary(model_config, tokenizer, model_path)
            check_positions(model_config, config.max_length, model_path)
    with collecting(problems):
        sets = _read_sets(Path(config.data_dir), list(filter(is_set_name, config.sets)), config.limit)
    if tokenizer and sets:
        for name, records in sets.items():
            with collecting(problems):
                sets[name] = render(records, tokenizer, Path(config.data_dir) / name)
    if problems:
        raise InputError(problems)
    return Inputs(model_path, family, tokenizer, precision, sets)


def _base_model(adapter: str) -> str:
    """The model that a LoRA adapter was trained on. Raises InputError when the adapter does not say."""
    file = find_adapter(adapter) / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise InputError(f"{file} is not a JSON object") from None
    if not base:
        raise InputError(f"{file} does not name the base model; give it as --model-path")
    return base


def _read_sets(data_dir: Path, names: Sequence[str], limit: int | None) -> dict[str, list[Record]]:
    """The records of each set that is there. Raises InputError for bad lines, or when none is there."""
    files = {name: data_dir / name / "valid.jsonl" for name in names}
    found = {name: file for name, file in files.items() if file.is_file()}
    missing = [str(file) for name, file in files.items() if name not in found]
    if names and not found:
        raise InputError(f"none of the sets is there; looked for {', '.join(missing)}")
    if missing:
        logger.warning("sets that are not there and are skipped: %s", ", ".join(missing))
    problems: list[str] = []
    sets = {}
    for name, file in found.items():
        with collecting(problems):
            sets[name] = load_records(file, limit)
    if problems:
        raise InputError(problems)
    logger.info("sets: %s", ", ".join(f"{name} ({len(records)})" for name, records in sets.items()))
    return sets
