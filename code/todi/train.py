"""Trains a student by SFT or by distillation.

    python -m todi.train --model-path STUDENT --teacher-model-path TEACHER --kd-objective ToDi --save-dir DIR

or under torchrun for several devices. The launchers in scripts/ fill in the options; --help lists them.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from todi.criterions import DistillationCriterion, build_divergence
from todi.data.plans import DatasetSource, SampleSource, StepShape
from todi.data.tokenize import Example, encode_examples, encode_prompts
from todi.doctor import examine
from todi.errors import run_main
from todi.generation.decoding import Decoding
from todi.models.backbone import check_head
from todi.models.card import Base, model_card
from todi.models.checks import reachable_tokens
from todi.models.loading import add_lora, load_model
from todi.options import parse
from todi.runtime.cadence import Cadence
from todi.runtime.device import choose_device, dtype_of
from todi.runtime.distributed import World, start_process_group, stop_process_group, world_from_environment
from todi.runtime.logs import set_up_logging
from todi.runtime.signals import Interrupted
from todi.settings import (
    ObjectiveConfig,
    OptimConfig,
    StudentConfig,
    TrainConfig,
    parse_kd_params,
)
from todi.teacher.callable import CallableTeacher
from todi.teacher.opening import LIVE, choose_caches, describe_choices, open_teachers
from todi.teacher.source import TeacherSource
from todi.teacher.spec import TeacherSpec
from todi.training.dev import DevSet
from todi.training.optimizer import build_optimizer, build_schedule
from todi.training.run_folder import begin, check_same_run, decided_earlier, describe_run
from todi.training.student import Student
from todi.training.train_inputs import Inputs, ModelInputs, read_inputs
from todi.training.trainer import Trainer

logger = logging.getLogger("todi.train")


def main() -> None:
    """Parse, check, build, run."""
    config = parse(TrainConfig, prog="python -m todi.train")
    world = world_from_environment()
    set_up_logging(world.is_main)
    device = choose_device(world.local_rank)
    try:
        _run(config, world, device)
    except Interrupted as stop:
        logger.info("%s", stop)
        sys.exit(128 + stop.number)
    finally:
        stop_process_group()


def _run(config: TrainConfig, world: World, device: torch.device) -> None:
    inputs = read_inputs(config, device)
    data, optim, folder = config.data, config.optim, Path(config.run.save_dir)
    examples = encode_examples(inputs.train, inputs.student.tokenizer, inputs.student.family, data.max_length,
                               data.max_prompt_length)
    shape = StepShape(optim.batch_size, optim.gradient_accumulation_steps, world.rank, world.size)
    source = DatasetSource(examples, shape, config.run.seed)
    max_steps = min(optim.num_epochs * source.steps_per_epoch, optim.max_steps or 2**62)
    specs = build_teacher_specs(config, inputs, examples)
    run = caches = None
    if world.is_main:
        run, caches = _decide(config, inputs, specs, max_steps / source.steps_per_epoch, world, device)
    if config.run.check_only:
        return
    start_process_group(world, device)
    run, caches = world.gather((run, caches))[0]
    if not begin(folder, run, world, anew=config.run.resume == "never"):
        return
    _log_decisions(inputs, world, device)
    logger.info("%d samples in steps of %d (batch %d x accumulation %d x devices %d): %d steps in %d epochs",
                len(examples), shape.samples, shape.batch_size, shape.accumulation, world.size,
                max_steps, -(-max_steps // source.steps_per_epoch))
    if world.is_main:
        examine(config, inputs, examples, world, device, cached=[cache is not None for cache in caches]).log()
    # before the student is there: a pass that fills a cache needs room for the teacher
    teacher = build_teacher(config, inputs, specs, caches, world, device)
    _train(config, inputs, source, max_steps, teacher, build_card(config, inputs, run), world, device)


def _decide(config: TrainConfig, inputs: Inputs, specs: Sequence[TeacherSpec], passes: float, world: World,
            device: torch.device) -> tuple[dict[str, Any], list[Path | None]]:
    """What args.json will hold, and for each teacher the folder of its cache if there is to be one; for the first rank.

    Raises:
        InputError: the run in the folder, or the cache, is another one.
    """
    folder = Path(config.run.save_dir)
    earlier = {} if config.run.resume == "never" else decided_earlier(folder)
    caches = choose_caches(specs, config.cache.teacher_cache, passes=passes, ranks=world.size, device=device,
                           earlier=earlier.get("teacher"))
    source = LIVE if inputs.teacher_function else describe_choices(specs, caches)
    run = describe_run(config, world.size, [inputs.train_file, inputs.dev_file], source)
    if config.run.resume == "auto":
        check_same_run(folder, run)
    return run, caches


def _train(config: TrainConfig, inputs: Inputs, source: SampleSource, max_steps: int, teacher: TeacherSource | None,
           card: Callable[[Mapping[str, float]], str], world: World, device: torch.device) -> None:
    torch.manual_seed(config.run.seed + world.rank)  # dropout and new LoRA weights
    student = build_student(config.student, inputs.student, device)
    engine = build_engine(student, config.optim, inputs, max_steps)
    trainer = Trainer(
        engine, source=source, dev=build_dev_set(config, inputs), criterion=build_criterion(config.objective),
        teacher=teacher, tokenizer=inputs.student.tokenizer, world=world, folder=Path(config.run.save_dir),
        keep_best=config.run.keep_best_n_checkpoints, max_steps=max_steps, log_interval=config.run.log_interval,
        eval_interval=config.run.eval_interval, cadence=Cadence(config.run.save_state_every),
        max_bad_steps=config.run.max_bad_steps, card=card)
    trainer.train()


def build_student(config: StudentConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    """The model that is trained: all of it, or a LoRA adapter on it."""
    model = load_model(inputs.path, inputs.precision.dtype, device, config.trust_remote_code)
    check_head(model, inputs.path)
    attention = model.config._attn_implementation
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.peft:
        model = add_lora(model, inputs.family, config.peft_lora_r, config.peft_lora_alpha, config.peft_lora_dropout,
                         config.peft_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("student %s: %.1f M parameters, %.1f M trained, %s, attention: %s", inputs.path,
                sum(p.numel() for p in model.parameters()) / 1e6, trained / 1e6, inputs.precision.name, attention)
    return model


def build_teacher_specs(config: TrainConfig, inputs: Inputs, examples: Sequence[Example]) -> list[TeacherSpec]:
    """What is asked of each teacher."""
    return [TeacherSpec(model.path, model.adapter, config.teacher.teacher_model_type, config.teacher.teacher_dtype,
                        config.data, model.precision,
                        dtype_of(config.cache.teacher_cache_dtype, model.precision.dtype), inputs.student.tokenizer,
                        examples, [inputs.train_file], config.student.trust_remote_code)
            for model in inputs.teachers]


def build_teacher(config: TrainConfig, inputs: Inputs, specs: Sequence[TeacherSpec], caches: Sequence[Path | None],
                  world: World, device: torch.device) -> TeacherSource | None:
    """Who answers for the labelled rows: a function, a model or its cache, the mean of several; None for SFT."""
    if inputs.teacher_function:
        last_token, _ = reachable_tokens(inputs.student.tokenizer)[-1]
        return CallableTeacher(inputs.teacher_function, config.teacher.teacher_callable, vocabulary=last_token + 1)
    return open_teachers(specs, caches, config.teacher.teacher_weights, world, device) if specs else None


def build_criterion(config: ObjectiveConfig) -> DistillationCriterion:
    """The training criterion that the settings name."""
    if not config.distils:
        return DistillationCriterion(label_smoothing=config.label_smoothing, chunk_size=config.loss_chunk_size)
    divergence = build_divergence(config.kd_objective, **parse_kd_params(config.kd_params))
    return DistillationCriterion(divergence, config.kd_temperature, config.kd_rate, config.label_smoothing,
                                 config.loss_chunk_size)


def build_engine(model: nn.Module, config: OptimConfig, inputs: Inputs, max_steps: int) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine around the student, its optimizer and its schedule."""
    student = Student(model)
    optimizer = build_optimizer(student, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2),
                                eps=config.adam_eps, weight_decay=config.weight_decay,
                                skip_bad_steps=inputs.deepspeed_config["zero_optimization"]["stage"] == 0)
    schedule = build_schedule(optimizer, config.lr_scheduler, total_steps=max_steps,
                              warmup_steps=config.warmup_iters, lr=config.lr, lr_min=config.lr_min)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, lr_scheduler=schedule,
                                      config=inputs.deepspeed_config)
    student.share_head()
    return engine


def build_dev_set(config: TrainConfig, inputs: Inputs) -> DevSet:
    """The dev records, encoded for the loss and for generation."""
    data, tokenizer, family = config.data, inputs.student.tokenizer, inputs.student.family
    return DevSet(
        inputs.dev,
        encode_examples(inputs.dev, tokenizer, family, data.max_length, data.max_prompt_length),
        encode_prompts(inputs.dev, tokenizer, family, data.max_prompt_length),
        Decoding(data.max_length) if config.run.eval_gen else None,
        config.run.eval_batch_size, config.run.seed)


def build_card(config: TrainConfig, inputs: Inputs, run: Mapping[str, Any]) -> Callable[[Mapping[str, float]], str]:
    """What makes a checkpoint's README.md from its metrics; `run` is what args.json holds."""
    data = {str(file): run["deciding"][file.name] for file in (inputs.train_file, inputs.dev_file)}
    student, *teachers = (Base(model.path, model.family, model.adapter) for model in (inputs.student, *inputs.teachers))
    return partial(model_card, run["settings"], data, run["versions"], student, teachers)


def _log_decisions(inputs: Inputs, world: World, device: torch.device) -> None:
    precision = inputs.student.precision
    logger.info("device: %s x %d; precision: %s (%s); ZeRO stage %d", device.type, world.size, precision.name,
                precision.reason, inputs.deepspeed_config["zero_optimization"]["stage"])


if __name__ == "__main__":
    run_main(main)
