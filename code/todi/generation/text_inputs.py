"""Everything that teacher text needs before any weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from todi.data.chat import render_sets
from todi.data.records import Record, load_sets
from todi.data.template_date import TemplateDate
from todi.data.tokenize import encode_prompts
from todi.errors import InputError, collecting
from todi.generation.text_files import earlier_date
from todi.generation.writing_model import read_writing_model
from todi.models.inputs import ModelInputs
from todi.python_files import load_plugins
from todi.settings import GenerateConfig


@dataclass(frozen=True)
class TextInputs:
    """What was read, short of weights.

    Attributes:
        model: --model-path or the adapter's own base.
        records: of all folders, one folder after the other, with or without responses.
        prompts: token ids of each.
        dev: the contents of dev.jsonl, of all folders that have one.
        template_date: `TemplateDate.noted` of the one date of the chat template.
    """

    model: ModelInputs
    records: list[Record]
    prompts: list[list[int]]
    dev: bytes
    template_date: str


def read_inputs(config: GenerateConfig, device: torch.device) -> TextInputs:
    """Everything that `config` names, short of weights.

    Raises:
        InputError: with every problem of settings, paths and data.
    """
    load_plugins(config.plugins)
    problems = config.problems()
    files = [Path(folder) / "train.jsonl" for folder in config.data_dir]
    dev_files = [file for file in (Path(folder) / "dev.jsonl" for folder in config.data_dir) if file.is_file()]
    model, sets, records, prompts = None, [], [], []
    date = TemplateDate()
    with collecting(problems):
        model = read_writing_model(config.model_path, config.peft_path, config.precision, device,
                                   config.decoding.max_length, config.trust_remote_code)
    with collecting(problems):
        sets = _load_alike(files, config.limit, responses=False)
    with collecting(problems):
        _load_alike(dev_files)
    with collecting(problems):
        if model and sets:
            date = TemplateDate(config.template_date, earlier_date(Path(config.save_dir)))
            records = list(chain(*render_sets(sets, model.tokenizer, files, date)))
            prompts = encode_prompts(records, model.tokenizer, model.family, config.decoding.max_prompt_length)
    if problems:
        raise InputError(problems)
    return TextInputs(model, records, prompts, _joined(dev_files), date.noted)


def _load_alike(files: Sequence[Path], limit: int | None = None, responses: bool = True) -> list[list[Record]]:
    """The records of files that will be one: training reads it. Raises InputError where they are of two forms."""
    sets = load_sets(files, limit, responses)
    forms = {bool(records[0].messages): file for file, records in zip(files, sets, strict=True)}
    if len(forms) > 1:
        raise InputError(f"{forms[True]} has `messages`, {forms[False]} `prompt`, and a file that training reads is of "
                         "one form: have them answered into two folders, and train on both")
    return sets


def _joined(files: Sequence[Path]) -> bytes:
    """The contents of files of lines, of which the last may lack its end."""
    contents = [file.read_bytes() for file in files]
    return b"".join(content if content.endswith(b"\n") else content + b"\n" for content in contents[:-1]) + b"".join(
        contents[-1:])
