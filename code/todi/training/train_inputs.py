"""Reads and checks everything that a training run needs, before any weights are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import build_divergence
from todi.data.chat import render
from todi.data.records import Record, load_records
from todi.errors import InputError, collecting
from todi.models.checks import check_adapter, check_positions, check_vocabulary
from todi.models.families import Family, family_of
from todi.models.loading import load_config, load_tokenizer
from todi.models.tokenizers import tokenizer_difference
from todi.runtime.device import Precision, choose_precision
from todi.settings import ObjectiveConfig, TrainConfig, parse_kd_params
from todi.teacher.callable import Function, load_function
from todi.training.deepspeed_config import build_deepspeed_config


@dataclass(frozen=True)
class ModelInputs:
    """What is known of a model before its weights are loaded."""

    path: str
    config: PretrainedConfig
    family: Family
    tokenizer: Tokenizer
    precision: Precision
    adapter: str | None


@dataclass(frozen=True)
class Inputs:
    """What was read. `train_file` and `dev_file` are where the records came from.

    Attributes:
        teachers: none for SFT, or where a function answers in their place.
        teacher_function: that function.
    """

    student: ModelInputs
    teachers: list[ModelInputs]
    teacher_function: Function | None
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
    student = function = precision = deepspeed_config = train = dev = None
    teachers: list[ModelInputs] = []
    with collecting(problems):
        check_objective(config.objective)
    with collecting(problems):
        train = load_records(train_file, config.data.train_num)
    with collecting(problems):
        dev = load_records(dev_file, config.data.dev_num)
    with collecting(problems):
        precision = choose_precision(config.run.precision, device)
        deepspeed_config = build_deepspeed_config(
            precision=precision, zero_stage=config.run.zero_stage, batch_size=config.optim.batch_size,
            accumulation=config.optim.gradient_accumulation_steps, clip_grad=config.optim.clip_grad,
            override_file=config.run.deepspeed_config)
    teacher_precision = precision
    if config.teacher.teacher_dtype:
        with collecting(problems):
            teacher_precision = choose_precision(config.teacher.teacher_dtype, device, "--teacher-dtype")
    if config.student.model_path:
        with collecting(problems):
            student = read_model(config.student.model_path, config.student.model_type, config.student.peft_path,
                                 precision, config.data.max_length, config.student.trust_remote_code)
    if config.objective.distils:
        for path, adapter in zip(config.teacher.teacher_model_path, config.teacher.adapters, strict=False):
            with collecting(problems):
                teachers.append(read_model(path, config.teacher.teacher_model_type, adapter, teacher_precision,
                                           config.data.max_length, config.student.trust_remote_code))
    if config.objective.distils and config.teacher.teacher_callable:
        with collecting(problems):
            function = load_function(config.teacher.teacher_callable)
    for teacher in teachers if student else ():
        with collecting(problems):
            _check_tokenizers(student, teacher)
    with collecting(problems):
        if student and train and dev:
            train, dev = render(train, student.tokenizer, train_file), render(dev, student.tokenizer, dev_file)
    if problems:
        raise InputError(problems)
    return Inputs(student, teachers, function, deepspeed_config, train, dev, train_file, dev_file)


def read_model(path: str, model_type: str, adapter: str | None, precision: Precision | None, max_length: int,
               trust_remote_code: bool) -> ModelInputs:
    """What is known of a model and its adapter short of weights. Raises InputError with every problem."""
    model_config = load_config(path, trust_remote_code)
    problems: list[str] = []
    family = tokenizer = None
    with collecting(problems):
        family = _family(model_type, model_config.model_type)
    if adapter:
        with collecting(problems):
            check_adapter(adapter, model_config, path, trust_remote_code)
    with collecting(problems):
        check_positions(model_config, max_length, path)
    with collecting(problems):
        tokenizer = load_tokenizer(path, trust_remote_code)
        check_vocabulary(model_config, tokenizer, path)
    if problems:
        raise InputError(problems)
    return ModelInputs(path, model_config, family, tokenizer, precision, adapter)


def check_objective(objective: ObjectiveConfig) -> None:
    """Whether there is such a divergence with such parameters. Raises InputError where there is not."""
    try:
        build_divergence(objective.kd_objective, **parse_kd_params(objective.kd_params))
    except ValueError as error:
        raise InputError(f"--kd-objective / --kd-params: {error}") from None


def _family(model_type: str, architecture: str) -> Family:
    try:
        return family_of(model_type, architecture)
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_tokenizers(student: ModelInputs, teacher: ModelInputs) -> None:
    difference = tokenizer_difference(student.tokenizer, teacher.tokenizer)
    if difference:
        raise InputError(f"the teacher {teacher.path} and the student have different tokenizers: {difference}. "
                         "Distillation compares their distributions entry by entry. Take two models of one family, "
                         "or, if both were trained with one tokenizer, copy its files over the other's")
