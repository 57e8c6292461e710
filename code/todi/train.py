"""Trains a student by SFT or by distillation.

    python -m todi.train --model-path STUDENT --teacher-model-path TEACHER --kd-objective ToDi --save-dir DIR

or under torchrun for several devices. The launchers in scripts/ fill in the options; --help lists them.
"""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from todi.data.sample_sources import build_source
from todi.data.template_date import check_same_date
from todi.doctor import examine
from todi.errors import run_main
from todi.job import Job, about_to_do, check_same_folders, decide, decide_together, look, meet, prepare
from todi.models.packing import takes_packed
from todi.options import parse
from todi.runtime.allocator import settle_allocator, who_allocates
from todi.runtime.device import choose_device, settle_tf32
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.runtime.heartbeat import start_heart
from todi.runtime.logs import set_up_logging
from todi.runtime.nodes import check_ranks, nodes_from_environment, refusals_told
from todi.runtime.signals import Interrupted
from todi.settings import TrainConfig
from todi.training.building import (
    build_card,
    build_criterion,
    build_dev_set,
    build_engine,
    build_export,
    build_meter,
    build_monitors,
    build_pace,
    build_student_source,
    build_teacher,
    choose_layout,
)
from todi.training.dev import DevSet
from todi.training.run_folder import RunFolder
from todi.training.step import TrainStep
from todi.training.train_inputs import longest_sample, teacher_layers
from todi.training.trainer import Trainer

logger = logging.getLogger("todi.train")


def main() -> None:
    """Parse, check, build, run."""
    config = parse(TrainConfig, prog="python -m todi.train")
    world = world_from_environment()
    start_heart(world)
    set_up_logging(world.is_main)
    device = choose_device(world.local_rank)
    settle_allocator(config.run.allocator, device)
    settle_tf32(config.run.tf32, device)
    try:
        train(config, world, device)
    except Interrupted as stop:
        sys.exit(128 + stop.number)


def train(config: TrainConfig, world: World, device: torch.device) -> None:
    """Checks everything, then trains, unless the run has finished already.

    Raises:
        RunError: see its kinds.
        Interrupted: a signal asked to stop; the state has been saved.
    """
    nodes = nodes_from_environment() if config.run.check_only else None
    with refusals_told(nodes):
        job = prepare(config, world, device)
        config = job.config
        dev = build_dev_set(config, job.inputs, world)
        if config.run.check_only:
            look(job)
        elif world.size == 1:  # before the seconds that a process group takes
            run, caches = decide(job)
    if config.run.check_only:
        if nodes:
            meet(job, nodes)
        return
    with ExitStack() as stack:
        stack.enter_context(process_group(world, device, config.run.process_group_timeout))
        if world.size > 1:
            run, caches = decide_together(job)
        check_ranks(world, about_to_do(job, run))
        check_same_date(job.inputs.template_date, world)
        if world.size > world.local_size:
            check_same_folders(config, caches, world, "rank", marks=world.local_rank == 0)
        folder = RunFolder(Path(config.run.save_dir), world, config.run.keep_best_n_checkpoints)
        stack.enter_context(folder.claimed())
        if not folder.start_run(run, anew=config.run.resume == "never"):
            return
        _log_decisions(job)
        trainer = _assemble(job, dev, run, caches, folder, stack)
        try:
            trainer.train()
        except Interrupted as stop:
            logger.info("%s", stop)
            raise


def _reads_rounds(job: Job, caches: Sequence[Path | None]) -> bool:
    """Whether the teachers read the samples of a round when it begins, and keep what they found, not batch by batch."""
    config, mode = job.config, job.config.cache.teacher_cache
    if not config.source.on_policy or not job.specs or teacher_layers(job.terms):
        return False
    return mode != "off" and (mode != "auto" or config.source.replays or any(caches))


def _assemble(job: Job, dev: DevSet, run: Mapping[str, Any], caches: Sequence[Path | None], folder: RunFolder,
              stack: ExitStack) -> Trainer:
    """Loads the models, and puts the trainer together; `stack` gives back what it holds."""
    config, inputs, world, device = job.config, job.inputs, job.world, job.device
    rounds = folder.rounds if _reads_rounds(job, caches) else None
    report = None
    if world.is_main:
        cached = [cache is not None and rounds is None for cache in caches]
        report = examine(config, inputs, job.examples, world, device, cached)
        report.log()
    spread = world.from_main(report and report.teacher_spread)
    meter = build_meter(config.run, inputs.student.precision, folder, world, device)
    # before the student is there: a pass that fills a cache needs room for the teacher
    teacher = build_teacher(config, inputs, job.specs, caches, teacher_layers(job.terms), rounds, meter, world, device,
                            spread)
    engine = build_engine(config, inputs, job.terms, job.max_steps, meter, world, device)
    stack.callback(engine.destroy)  # its hooks would keep its buffers for as long as the process lasts
    shape, batch = choose_layout(config.optim, job.shape, longest_sample(config, job.examples)[0],
                                 inputs.student.tokenizer.pad_token_id,
                                 takes_packed(engine.module.model) and (not teacher or teacher.takes_packed),
                                 meter.cost, responses=1 + config.source.paired)
    monitors = build_monitors(config, folder, job.max_steps)
    stack.enter_context(closing(monitors))
    source = build_source(job.examples, inputs.train_sizes, config.data.data_shares, shape, config.run.seed)
    if config.source.on_policy:
        source = build_student_source(config, inputs, source, engine.module.model, teacher if rounds else None,
                                      monitors, meter, job.max_steps, world)
    criterion = build_criterion(config.objective, config.source)
    step = TrainStep(engine, criterion, teacher, batch, world, meter, criterion.schedule(job.max_steps))
    stack.enter_context(closing(step))
    stack.enter_context(closing(meter))
    return Trainer(step, source, dataclasses.replace(dev, collate=batch),
                   build_export(engine, inputs, build_card(config, inputs, run), world), folder, monitors,
                   build_pace(config.run, job.max_steps), world, meter)


def _log_decisions(job: Job) -> None:
    precision, shape, samples = job.inputs.student.precision, job.shape, len(job.examples)
    tf32 = job.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    logger.info("device: %s x %d; precision: %s (%s)%s; ZeRO stage %d", job.device.type, job.world.size, precision.name,
                precision.reason, ", fp32 products in TF32" if tf32 else "",
                job.inputs.deepspeed_config["zero_optimization"]["stage"])
    logger.info("allocator: %s", who_allocates())
    logger.info("%d samples in steps of %d (batch %d x accumulation %d x devices %d): %d steps in %d epochs", samples,
                shape.samples, shape.batch_size, shape.accumulation, job.world.size, job.max_steps,
                -(-job.max_steps // shape.steps(samples)))


if __name__ == "__main__":
    run_main(main)
