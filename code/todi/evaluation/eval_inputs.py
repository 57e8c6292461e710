"""Everything that an evaluation reads before any weights are loaded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from todi.data.chat import render
from todi.data.records import Record, load_records
from todi.data.template_date import TemplateDate
from todi.data.tokenize import Example, encode_examples
from todi.errors import InputError, collecting
from todi.evaluation.results import is_set_name
from todi.evaluation.rouge_tokens import choose_tokenizer
from todi.evaluation.set_files import earlier_value
from todi.generation.decoding import Decoding
from todi.generation.writing_model import build_decoding, read_writing_model
from todi.models.inputs import ModelInputs
from todi.python_files import load_plugins
from todi.settings import EvalConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalInputs:
    """What was read, short of weights.

    Attributes:
        model: --model-path or the adapter's own base.
        examples: of each set, its records as they are read by the model.
        rouge_tokenizers: of each set, what ROUGE-L compares; never auto.
        template_date: `TemplateDate.noted` of the one date of the chat template.
    """

    model: ModelInputs
    sets: dict[str, list[Record]]
    examples: dict[str, list[Example]]
    rouge_tokenizers: dict[str, str]
    template_date: str


def read_inputs(config: EvalConfig, device: torch.device) -> EvalInputs:
    """Everything that `config` names, short of weights.

    Raises:
        InputError: with every problem of settings, paths and data.
    """
    load_plugins(config.plugins)
    problems = config.problems()
    model = sets = None
    examples = {}
    with collecting(problems):
        model = read_writing_model(config.model_path, config.peft_path, config.precision, device,
                                   config.decoding.max_length, config.trust_remote_code)
    with collecting(problems):
        sets = _read_sets(Path(config.sets_dir), list(filter(is_set_name, config.sets)), config.limit)
    if model and sets:
        date = TemplateDate(config.template_date, earlier_value(config.folder, list(sets), "template_date"))
        for name, records in sets.items():
            with collecting(problems):
                sets[name] = render(records, model.tokenizer, Path(config.sets_dir) / name, date)
                examples[name] = encode_examples(sets[name], model.tokenizer, model.family, config.decoding.max_length,
                                                 config.decoding.max_prompt_length)
    if problems:
        raise InputError(problems)
    rouge_tokenizers = {name: choose_tokenizer(config.rouge_tokenizer, [record.references for record in records], name)
                        for name, records in sets.items()}
    return EvalInputs(model, sets, examples, rouge_tokenizers, date.noted)


def decoding_of(config: EvalConfig) -> Decoding:
    """How the responses are written."""
    return build_decoding(config.decoding, config.max_new_tokens, config.no_repeat_ngram_size)


def _read_sets(folder: Path, names: Sequence[str], limit: int | None) -> dict[str, list[Record]]:
    """The records of each set that is there. Raises InputError for bad lines, or when none is there."""
    files = {name: folder / name / "valid.jsonl" for name in names}
    found = {name: file for name, file in files.items() if file.is_file()}
    missing = [str(file) for name, file in files.items() if name not in found]
    if names and not found and (folder / "valid.jsonl").is_file():
        raise InputError(f"{folder} is a set itself: it has valid.jsonl. Give the folder that it is in, and its name: "
                         f"--sets-dir {folder.parent} --sets {folder.name}, or SETS_DIR={folder.parent} "
                         f"SETS={folder.name}")
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
