"""Reads and checks everything that a training run needs, before any weights are loaded."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from todi.criterions import LossTerm, ModelShape, TermContext, build_divergence, build_terms
from todi.criterions.kernels import check_kernels
from todi.data.chat import render_sets
from todi.data.records import Record, load_sets
from todi.data.sample_sources import epoch_counts
from todi.data.template_date import TemplateDate
from todi.data.tokenize import Example
from todi.errors import InputError, collecting
from todi.models.adapters import check_lora
from todi.models.checks import check_checkpointing
from todi.models.inputs import ModelInputs, read_model
from todi.models.loading import checksum_or_commit
from todi.models.tokenizers import tokenizer_difference
from todi.python_files import load_plugins
from todi.runtime.checksums import file_checksum, weights_checksum
from todi.runtime.device import Precision, choose_precision
from todi.runtime.distributed import world_from_environment
from todi.settings import DataConfig, ObjectiveConfig, RunConfig, TrainConfig, named_numbers
from todi.teacher.callable import Function, load_function
from todi.training.deepspeed_config import build_deepspeed_config
from todi.training.monitors import check_monitors
from todi.training.record import read_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainInputs:
    """What was read.

    Attributes:
        teachers: none for SFT, or where a function answers in their place.
        teacher_function: that function.
        train, dev: the records of all sets, one set after the other.
        train_files, dev_files: where they came from.
        train_sizes: how many training records each set has.
        template_date: `TemplateDate.noted` of the one date of all chat templates.
    """

    student: ModelInputs
    teachers: list[ModelInputs]
    teacher_function: Function | None
    deepspeed_config: dict[str, Any]
    train: list[Record]
    dev: list[Record]
    train_files: list[Path]
    dev_files: list[Path]
    train_sizes: list[int]
    template_date: str


def read_inputs(config: TrainConfig, device: torch.device) -> TrainInputs:
    """Everything that `config` names, short of weights.

    Raises:
        InputError: with every problem of settings, paths, data and tokenizers.
    """
    load_plugins(config.run.plugins)
    problems = config.problems()
    train_files, dev_files = data_files(config.data.data_dir)
    train = dev = function = None
    with collecting(problems):
        check_objective(config.objective.kd_objective, config.objective.kd_params, "--kd")
    with collecting(problems):
        if config.source.student_kd_objective:
            check_objective(config.source.student_kd_objective, config.source.student_kd_params, "--student-kd",
                            may_move=False)
    with collecting(problems):
        check_monitors(config.run.report_to)
    with collecting(problems):
        train = load_sets(train_files, config.data.train_num, responses=config.source.uses_responses)
    with collecting(problems):
        dev = load_sets(dev_files, config.data.dev_num)
    precision, deepspeed_config = _computation(config, device, problems)
    student, teachers = _models(config, precision, device, problems)
    if config.objective.distils and config.teacher.teacher_callable:
        with collecting(problems):
            function = load_function(config.teacher.teacher_callable)
    with collecting(problems):
        if student and not problems:
            _check_loss_terms(config, student, teachers)
    for teacher in teachers if student else ():
        with collecting(problems):
            _check_tokenizers(student, teacher)
    date = TemplateDate()
    with collecting(problems):
        date = TemplateDate(config.data.template_date, _earlier_date(config.run))
    with collecting(problems):
        if student and train and dev:
            train, dev = (render_sets(sets, student.tokenizer, files, date)
                          for sets, files in ((train, train_files), (dev, dev_files)))
    with collecting(problems):
        if not problems and len(train) > 1:
            _check_shares(config.data, [len(records) for records in train])
    if problems:
        raise InputError(problems)
    return TrainInputs(student, teachers, function, deepspeed_config, list(chain(*train)), list(chain(*dev)),
                       train_files, dev_files, [len(records) for records in train], date.noted)


def _computation(config: TrainConfig, device: torch.device,
                 problems: list[str]) -> tuple[Precision | None, dict[str, Any] | None]:
    """The run's precision and its DeepSpeed configuration; None where a problem was added to the others."""
    precision = deepspeed_config = None
    with collecting(problems):
        precision = choose_precision(config.run.precision, device)
        ranks = world_from_environment().size
        deepspeed_config = build_deepspeed_config(
            precision=precision, zero_stage=config.run.zero_stage, batch_size=config.optim.batch_size,
            accumulation=config.optim.accumulation(ranks), clip_grad=config.optim.clip_grad,
            offload=config.run.offload, ranks=ranks, override_file=config.run.deepspeed_config)
    with collecting(problems):
        if config.student.compile and deepspeed_config and deepspeed_config["zero_optimization"]["stage"] == 3:
            raise InputError("--compile needs ZeRO stage 0, 1 or 2; 3 gathers a layer's weights at each call of it")
    with collecting(problems):
        if not problems:
            objective = config.objective
            divergence = build_divergence(objective.kd_objective, **named_numbers(objective.kd_params))
            check_kernels(objective.kernels, precision.dtype, device, divergence if objective.distils else None)
    return precision, deepspeed_config


def _models(config: TrainConfig, precision: Precision | None, device: torch.device,
            problems: list[str]) -> tuple[ModelInputs | None, list[ModelInputs]]:
    """The student, None where a problem was added to the others, and those of the teachers that have none."""
    student, teachers, teacher_precision = None, [], precision
    options, length, trust = config.student, config.data.max_length, config.student.trust_remote_code
    if config.teacher.teacher_dtype:
        with collecting(problems):
            teacher_precision = choose_precision(config.teacher.teacher_dtype, device, "--teacher-dtype")
    if options.model_path:
        with collecting(problems):
            student = read_model(options.model_path, options.model_type, options.peft_path, precision, length, trust,
                                 trained=True)
            if options.gradient_checkpointing:
                check_checkpointing(student.config, student.path, trust)
            if options.peft and not options.peft_path:
                check_lora(student.config, student.family, options.peft_lora_targets, student.path, trust)
    if config.objective.distils:
        for path, adapter in zip(config.teacher.teacher_model_path, config.teacher.adapters, strict=False):
            with collecting(problems):
                teachers.append(read_model(path, config.teacher.teacher_model_type, adapter, teacher_precision, length,
                                           trust))
    return student, teachers


def checksums(config: TrainConfig, inputs: TrainInputs, of_models: bool = True) -> dict[str, str]:
    """Of all that a run reads and what it computes follows from, by path; of a model on the Hub it is the commit.

    Args:
        of_models: the weights that lie here too, which takes a second for each gigabyte or two.
    """
    code = list(config.run.plugins)
    if inputs.teacher_function:
        code.append(config.teacher.teacher_callable.rpartition(":")[0])
    found = {str(file): file_checksum(file) for file in (*inputs.train_files, *inputs.dev_files, *code)}
    return found | said_of_models(config, inputs, weights_checksum, here=of_models)


def model_paths(inputs: TrainInputs) -> list[str]:
    """Of the student, the teachers and their adapters, each once; names, of those on the Hub."""
    models = (inputs.student, *inputs.teachers)
    return list(dict.fromkeys(path for model in models for path in (model.path, model.adapter) if path))


def said_of_models(config: TrainConfig, inputs: TrainInputs, say: Callable[[Path], str],
                   here: bool = True) -> dict[str, str]:
    """What `say` says of the models, by path; of one on the Hub, its commit.

    Args:
        here: of those that lie here too.
    """
    paths = [path for path in model_paths(inputs) if here or not Path(path).exists()]
    return {path: str(checksum_or_commit(path, say, config.student.trust_remote_code)) for path in paths}


def longest_sample(config: TrainConfig, examples: Sequence[Example]) -> tuple[int, int]:
    """Tokens of the longest sample, and of the longest response, that training can come to see."""
    longest = max(len(example.ids) for example in examples), max(example.response_tokens for example in examples)
    if not config.source.on_policy:
        return longest
    prompts = [example.prompt_length for example in examples]
    response = min(config.source.sample_tokens, config.data.max_length - min(prompts))
    sample = min(max(prompts) + response, config.data.max_length)
    return max(longest[0], sample), max(longest[1], response)


def check_objective(name: str, params: tuple[str, ...], flag: str, may_move: bool = True) -> None:
    """Whether there is such a divergence with such parameters. Raises InputError where there is not.

    Args:
        flag: what the flags of both begin with.
        may_move: whether a schedule may move its parameters.
    """
    try:
        divergence = build_divergence(name, **named_numbers(params))
    except ValueError as error:
        raise InputError(f"{flag}-objective / {flag}-params: {error}") from None
    if not may_move and divergence.schedule(1):
        raise InputError(f"{flag}-objective {name} moves its parameters from step to step; only --kd-objective can")


def build_loss_terms(objective: ObjectiveConfig, student: ModelInputs,
                     teachers: Sequence[ModelInputs]) -> dict[str, LossTerm]:
    """The further terms of the loss. Raises InputError where there is no such term, or it does not suit the models."""
    shapes = [ModelShape(model.config.num_hidden_layers, model.config.hidden_size) for model in (student, *teachers)]
    context = TermContext(shapes[0], shapes[1] if len(teachers) == 1 else None, objective.layer_pairs)
    try:
        return build_terms(named_numbers(objective.loss_terms), context)
    except ValueError as error:
        raise InputError(f"--loss-terms: {error}") from None


def teacher_layers(terms: Mapping[str, LossTerm]) -> list[int]:
    """Numbers of the teacher's layers that any of the terms reads."""
    return sorted({layer for term in terms.values() for layer in term.teacher_layers})


def _check_loss_terms(config: TrainConfig, student: ModelInputs, teachers: Sequence[ModelInputs]) -> None:
    with torch.device("meta"):
        terms = build_loss_terms(config.objective, student, teachers)
    if teacher_layers(terms) and config.cache.teacher_cache not in ("auto", "off"):
        raise InputError(f"--teacher-cache {config.cache.teacher_cache}: a cache has the last hidden states only, and "
                         f"--loss-terms {' '.join(config.objective.loss_terms)} reads other layers; use "
                         "--teacher-cache off")


def data_files(folders: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Files of the training and of the dev records; several folders need one file of dev records among them."""
    train, dev = ([Path(folder) / f"{split}.jsonl" for folder in folders] for split in ("train", "dev"))
    return train, [file for file in dev if file.is_file()] or dev


def _earlier_date(run: RunConfig) -> str | None:
    """Of the run that goes on, if one does."""
    record = None if run.resume == "never" else read_record(Path(run.save_dir))
    return record and record["deciding"].get("template_date")


def _check_shares(data: DataConfig, sizes: Sequence[int]) -> None:
    """Logs what an epoch is mixed of. Raises InputError where a set would never be drawn from."""
    counts = epoch_counts(sizes, data.data_shares)
    mix = ", ".join(f"{count} of {folder} (which has {size})"
                    for count, folder, size in zip(counts, data.data_dir, sizes, strict=True))
    if 0 in counts:
        raise InputError(f"--data-shares {' '.join(map(str, data.data_shares))} leaves a folder out of an epoch of "
                         f"{sum(counts)} samples: {mix}")
    logger.info("an epoch has %d samples: %s", sum(counts), mix)


def _check_tokenizers(student: ModelInputs, teacher: ModelInputs) -> None:
    difference = tokenizer_difference(student.tokenizer, teacher.tokenizer)
    if difference:
        raise InputError(f"the teacher {teacher.path} and the student have different tokenizers: {difference}. "
                         "Distillation compares their distributions entry by entry. Take two models of one family, "
                         "or, if both were trained with one tokenizer, copy its files over the other's")
