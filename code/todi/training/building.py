"""From settings and inputs to the parts that a training run is made of."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from todi.criterions import DistillationCriterion, LossTerm, build_divergence
from todi.data.batches import Collate, collate
from todi.data.plans import Cost, PackedShape, StepShape
from todi.data.sample_sources import EpochSource
from todi.data.tokenize import Example, encode_examples, encode_prompts, end_id
from todi.generation.decoding import Decoding, stop_ids
from todi.generation.padding import check_decoding
from todi.generation.together import cache_bytes, rows_written_together
from todi.generation.writer import Writer
from todi.models.adapters import add_lora, load_adapter
from todi.models.backbone import backbone_and_head
from todi.models.card import Base, Card, model_card
from todi.models.checks import reachable_tokens
from todi.models.compiling import compile_layers
from todi.models.inputs import ModelInputs
from todi.models.loading import load_model
from todi.models.packing import use_packing
from todi.models.probe import check_model
from todi.runtime.cadence import Cadence
from todi.runtime.device import Precision, dtype_of
from todi.runtime.distributed import World
from todi.runtime.peaks import peak_of
from todi.runtime.stopwatch import Stopwatch, clock_of
from todi.runtime.trace import StepTrace
from todi.settings import (
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SamplesConfig,
    StudentConfig,
    TrainConfig,
    named_numbers,
)
from todi.teacher.callable import CallableTeacher
from todi.teacher.opening import open_teachers
from todi.teacher.source import TeacherSource
from todi.teacher.spec import TeacherSpec
from todi.training.checkpoints import save_model
from todi.training.dev import DevSet
from todi.training.mixtures import AdaptiveMixture, FixedMixture
from todi.training.monitors import Monitors, RunInfo
from todi.training.optimizer import build_optimizer, build_schedule, wrap
from todi.training.own_pace import OwnPace
from todi.training.run_folder import RunFolder
from todi.training.scores import Score
from todi.training.speed import Meter, SpeedMeter, forward_cost, training_cost
from todi.training.student import Student
from todi.training.student_text import Reader, Rounds, StudentSource
from todi.training.train_inputs import (
    TrainInputs,
)
from todi.training.trainer import Pace

logger = logging.getLogger(__name__)


def choose_layout(config: OptimConfig, shape: StepShape, longest: int, pad_id: int, can_pack: bool,
                  cost: Cost, responses: int = 1) -> tuple[StepShape, Collate]:
    """How a step is cut, and how a micro-batch is laid out: packed where that is wanted and the models can.

    Args:
        longest: tokens of a sample, at most.
        cost: of training on a token, which the ranks share evenly.
        responses: that are trained on for each sample of a step.
    """
    packed = can_pack and config.packing != "off"
    if packed:
        tokens = config.tokens(longest - 1)
        shape = PackedShape(**vars(shape), max_tokens=tokens, cost=cost)
        logger.info("micro-batches are packed, without padding: at most %d tokens each", tokens)
    else:
        shape = dataclasses.replace(shape, accumulation=shape.accumulation * responses)
        logger.info("micro-batches are padded: %d samples each", shape.batch_size)
    return shape, partial(collate, pad_id=pad_id, packed=packed)


def build_student_source(config: TrainConfig, inputs: TrainInputs, base: EpochSource, model: nn.Module,
                         reader: Reader | None, monitors: Monitors, meter: Meter, max_steps: int,
                         world: World) -> StudentSource:
    """The source whose samples the student writes, in full or in part."""
    samples, tokenizer = config.source, inputs.student.tokenizer
    decoding = Decoding(config.data.max_length, samples.sample_tokens, temperature=samples.sample_temperature,
                        top_p=samples.sample_top_p, top_k=samples.sample_top_k)
    length, width = config.data.max_length, inputs.student.precision.dtype.itemsize
    rows = rows_written_together(samples.sample_batch_size, inputs.student, length)
    room = cache_bytes(inputs.student.config, rows, length, width)
    logger.info("the student answers up to %d prompts together, %d steps at a time", rows, samples.round_steps)
    writer = Writer(model, tokenizer, decoding, rows, world, OwnPace(world, room))
    write = partial(writer.write, eos_ids=stop_ids(model, tokenizer, inputs.train))
    share = samples.student_share if samples.samples == "mixed" else 1
    mixture = AdaptiveMixture() if samples.samples == "adaptive" else FixedMixture(share, samples.replay)
    rounds = Rounds(samples.round_steps, max_steps, config.run.seed, samples.replay_size * samples.replays,
                    samples.paired)
    ends = [end_id(record, tokenizer) for record in inputs.train]
    return StudentSource(base, write, ends, mixture, rounds, reader=reader, tell=partial(monitors.log, "round"),
                         meter=meter)


def build_export(engine: deepspeed.DeepSpeedEngine, inputs: TrainInputs, card: Card,
                 world: World) -> Callable[[Score, Path], None]:
    """What writes the student that has a score into a folder."""
    def export(score: Score, path: Path) -> None:
        save_model(engine.module.model, inputs.student.tokenizer, path, card(score.metrics), writes_files=world.is_main)
        world.barrier()

    return export


def build_monitors(config: TrainConfig, folder: RunFolder, total_steps: int) -> Monitors:
    """metrics.jsonl and the trackers that the settings name, on the first rank; none on the others."""
    if folder.metrics is None:
        return Monitors()
    run = RunInfo(folder.path, str(folder.path), dataclasses.asdict(config), total_steps=total_steps)
    return Monitors({"metrics.jsonl": folder.metrics}, config.run.report_to, run)


def build_meter(config: RunConfig, precision: Precision, folder: RunFolder, world: World,
                device: torch.device) -> SpeedMeter:
    """What measures the run's speed; on the first rank it also writes the trace that the settings ask for."""
    peak = peak_of(device, precision.dtype, config.tf32) if config.mfu else None
    if peak:
        logger.info("peak of the device: %.0f GFLOP/s in %s (%s)", peak.flops / 1e9, precision.name, peak.source)
    trace = StepTrace(folder.path / "trace.json", config.profile, device) if config.profile and world.is_main else None
    return SpeedMeter(Stopwatch(clock_of(device)), peak, world, device, trace)


def build_pace(config: RunConfig, max_steps: int) -> Pace:
    """How long to train, and what happens how often."""
    return Pace(max_steps, config.log_interval, config.eval_interval, config.max_bad_steps,
                Cadence(config.save_state_every))


def build_student(config: StudentConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    """The model that is trained: all of it, or a LoRA adapter on it."""
    model = load_model(inputs.path, inputs.precision.dtype, device, config.trust_remote_code)
    attention = model.config._attn_implementation
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.peft:
        model = (load_adapter(model, config.peft_path) if config.peft_path else
                 add_lora(model, inputs.family, config.peft_lora_r, config.peft_lora_alpha, config.peft_lora_dropout,
                          config.peft_lora_targets))
    check_model(model, inputs.path, trained=True)
    use_packing(model, inputs.path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("student %s: %.1f M parameters, %.1f M trained, %s, attention: %s", inputs.path,
                sum(p.numel() for p in model.parameters()) / 1e6, trained / 1e6, inputs.precision.name, attention)
    return model


def build_teacher_specs(config: TrainConfig, inputs: TrainInputs, examples: Sequence[Example]) -> list[TeacherSpec]:
    """What is asked of each teacher."""
    return [TeacherSpec(model.path, model.adapter, config.teacher.teacher_model_type, config.teacher.teacher_dtype,
                        config.data, model.precision,
                        dtype_of(config.cache.teacher_cache_dtype, model.precision.dtype), inputs.student.tokenizer,
                        examples, inputs.train_files, config.student.trust_remote_code)
            for model in inputs.teachers]


def build_teacher(config: TrainConfig, inputs: TrainInputs, specs: Sequence[TeacherSpec], caches: Sequence[Path | None],
                  layers: Sequence[int], rounds: Path | None, meter: Meter, world: World, device: torch.device,
                  spread: bool = False) -> TeacherSource | None:
    """Who answers for the labelled rows: a function, a model or its cache, the mean of several; None for SFT."""
    if inputs.teacher_function:
        last_token, _ = reachable_tokens(inputs.student.tokenizer)[-1]
        logger.info("teacher: the function %s", config.teacher.teacher_callable)
        return CallableTeacher(inputs.teacher_function, config.teacher.teacher_callable, vocabulary=last_token + 1)
    if not specs:
        return None
    teacher = open_teachers(specs, caches, config.teacher.teacher_weights, world, device, layers, rounds, spread)
    for backbone, head in teacher.parts:
        meter.add_cost(forward_cost(backbone, head))
    return teacher


def build_criterion(config: ObjectiveConfig, samples: SamplesConfig) -> DistillationCriterion:
    """The training criterion that the settings name."""
    if not config.distils:
        return DistillationCriterion(label_smoothing=config.label_smoothing, chunk_size=config.loss_chunk_size,
                                     terms=named_numbers(config.loss_terms), kernels=config.kernels)
    divergence = build_divergence(config.kd_objective, **named_numbers(config.kd_params))
    if divergence.definition.sampled and samples.uses_responses:
        logger.warning("warning: %s is an estimate on the student's own text alone: --samples student", divergence.name)
    criterion = DistillationCriterion(divergence, config.kd_temperature, config.kd_rate, config.label_smoothing,
                                      config.loss_chunk_size, named_numbers(config.loss_terms), config.kernels)
    if not samples.student_kd_objective:
        return criterion
    divergence = build_divergence(samples.student_kd_objective, **named_numbers(samples.student_kd_params))
    return dataclasses.replace(criterion, own=dataclasses.replace(criterion, divergence=divergence))


def build_engine(config: TrainConfig, inputs: TrainInputs, terms: Mapping[str, LossTerm], max_steps: int, meter: Meter,
                 world: World, device: torch.device) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine around the student, its optimizer and its schedule."""
    optim = config.optim
    torch.manual_seed(config.run.seed + world.rank)  # dropout and new LoRA weights
    student = Student(build_student(config.student, inputs.student, device), terms, meter)
    meter.add_cost(training_cost(*backbone_and_head(student.model)))
    if config.run.eval_gen or config.source.on_policy:
        check_decoding(student.model, inputs.student.path, inputs.student.tokenizer.pad_token_id)
    student.terms.to(device, inputs.student.precision.dtype)
    optimizer = build_optimizer(student, lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps,
                                weight_decay=optim.weight_decay, clip_grad=inputs.deepspeed_config["gradient_clipping"],
                                stage=inputs.deepspeed_config["zero_optimization"]["stage"])
    schedule = build_schedule(optimizer, optim.lr_scheduler, total_steps=max_steps, warmup_steps=optim.warmup_iters,
                              lr=optim.lr, lr_min=optim.lr_min)
    engine = wrap(student, optimizer, schedule, inputs.deepspeed_config)
    student.share_head()
    if config.student.compile:
        compile_layers(student.model, "student")
    return engine


def build_dev_set(config: TrainConfig, inputs: TrainInputs, world: World) -> DevSet:
    """The dev records, encoded for the loss and for generation."""
    data, tokenizer, family = config.data, inputs.student.tokenizer, inputs.student.family
    rows = rows_written_together(config.run.eval_batch_size, inputs.student, data.max_length)
    return DevSet(
        inputs.dev,
        encode_examples(inputs.dev, tokenizer, family, data.max_length, data.max_prompt_length),
        encode_prompts(inputs.dev, tokenizer, family, data.max_prompt_length),
        tokenizer,
        Decoding(data.max_length) if config.run.eval_gen else None,
        rows,
        config.run.seed, world, partial(collate, pad_id=tokenizer.pad_token_id),
        config.run.rouge_tokenizer, config.run.eval_gen_repeat_times,
        cache_bytes(inputs.student.config, rows, data.max_length, inputs.student.precision.dtype.itemsize))


def build_card(config: TrainConfig, inputs: TrainInputs, run: Mapping[str, Any]) -> Card:
    """What makes a checkpoint's README.md from its metrics; `run` is what args.json holds."""
    data = {str(file): run["files"][str(file)] for file in (*inputs.train_files, *inputs.dev_files)}
    student, *teachers = (Base(model.path, model.family, model.adapter) for model in (inputs.student, *inputs.teachers))
    return partial(model_card, run["settings"], data, run["versions"], student, teachers)
