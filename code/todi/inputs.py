"""Reads and checks everything that a training run needs, before any weights are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.config import TrainConfig
from todi.data.chat import render
from todi.data.records import Record, load_records
from todi.data.tokenize import check_ids
from todi.engine.deepspeed_config import build_deepspeed_config
from todi.engine.device import Precision, choose_precision
from todi.models.families import Family, family_of
from todi.models.loading import find_adapter, load_config, load_tokenizer
from todi.models.tokenizers import tokenizer_difference
from todi.options import InputError, gathered


@dataclass(frozen=True)
class Inputs:
    """What was read. `train_file` and `dev_file` are where the records came from."""

    family: Family
    tokenizer: Tokenizer
    precision: Precision
    deepspeed_config: dict[str, Any]
    train: list[Record]
    dev: list[Record]
    train_file: Path
    dev_file: Path


def read_inputs(config: TrainConfig, device: torch.device) -> Inputs:
    """Everything that `config` names, short of weights.

    Raises:
        InputError: with every problem of settings, paths, data and tokenizers.
    """
    problems = config.problems()
    train_file, dev_file = (Path(config.data.data_dir) / f"{split}.jsonl" for split in ("train", "dev"))
    family = tokenizer = precision = deepspeed_config = train = dev = None
    with gathered(problems):
        train = load_records(train_file, config.data.train_num)
    with gathered(problems):
        dev = load_records(dev_file, config.data.dev_num)
    with gathered(problems):
        precision = choose_precision(config.run.precision, device)
        deepspeed_config = build_deepspeed_config(
            precision=precision, zero_stage=config.run.zero_stage, batch_size=config.optim.batch_size,
            accumulation=config.optim.gradient_accumulation_steps, clip_grad=config.optim.clip_grad,
            override_file=config.run.deepspeed_config)
    if config.student.model_path:
        with gathered(problems):
            family, tokenizer, vocabulary = _read_model(
                config.student.model_path, config.student.model_type, config.student.trust_remote_code,
                config.student.peft_path)
            train, dev = render(train or [], tokenizer, train_file), render(dev or [], tokenizer, dev_file)
            check_ids([*train, *dev], tokenizer, vocabulary, config.student.model_path)
    if config.objective.distils and config.teacher.teacher_model_path:
        with gathered(problems):
            _, teacher_tokenizer, vocabulary = _read_model(
                config.teacher.teacher_model_path, config.teacher.teacher_model_type,
                config.student.trust_remote_code, config.teacher.teacher_peft_path)
            check_ids(train or [], teacher_tokenizer, vocabulary, config.teacher.teacher_model_path)
            _check_tokenizers(tokenizer, teacher_tokenizer)
    if problems:
        raise InputError(problems)
    return Inputs(family, tokenizer, precision, deepspeed_config, train, dev, train_file, dev_file)


def _read_model(path: str, model_type: str, trust_remote_code: bool,
                adapter: str | None) -> tuple[Family, Tokenizer, int]:
    """Family, tokenizer, and rows of the embedding matrix."""
    model_config = load_config(path, trust_remote_code).get_text_config()
    try:
        family = family_of(model_type, model_config.model_type)
    except ValueError as error:
        raise InputError(str(error)) from None
    if adapter:
        find_adapter(adapter)
    return family, load_tokenizer(path, trust_remote_code), model_config.vocab_size


def _check_tokenizers(student: Tokenizer | None, teacher: Tokenizer) -> None:
    difference = student and tokenizer_difference(student, teacher)
    if difference:
        raise InputError(f"teacher and student have different tokenizers: {difference}. Distillation compares their "
                         "distributions entry by entry; take two models of one family")
