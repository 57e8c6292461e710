"""Trains a student by SFT or by distillation.

    python -m todi.train --model-path STUDENT --teacher-model-path TEACHER --kd-objective ToDi --save-dir DIR

or under torchrun for several devices. The launchers in scripts/ fill in the options; --help lists them.
"""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from todi.criterions import LossTerm
from todi.data.plans import StepShape
from todi.data.sample_sources import build_source
from todi.data.template_date import check_same_date
from todi.data.tokenize import Example, encode_examples, examples_checksum
from todi.doctor import examine
from todi.errors import run_main
from todi.models.packing import takes_packed
from todi.options import parse
from todi.runtime.allocator import settle_allocator, who_allocates
from todi.runtime.checksums import weights_listing, weights_place
from todi.runtime.device import choose_device, settle_tf32
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.runtime.heartbeat import start_heart
from todi.runtime.locks import check_unclaimed
from todi.runtime.logs import set_up_logging
from todi.runtime.nodes import Nodes, agree, check_ranks, nodes_from_environment, refusals_told, what_must_agree
from todi.runtime.shared_folders import Party, check_shared
from todi.runtime.signals import Interrupted
from todi.settings import CACHE_MODES, TrainConfig
from todi.teacher.opening import LIVE, choose_caches, describe_choices, is_complete, look_at_choices
from todi.teacher.spec import TeacherSpec
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
    build_teacher_specs,
    choose_layout,
)
from todi.training.dev import DevSet
from todi.training.record import check_same_run, describe_run, read_record, with_steps_as_before
from todi.training.run_folder import RunFolder
from todi.training.step import TrainStep
from todi.training.train_inputs import (
    TrainInputs,
    build_loss_terms,
    checksums,
    longest_sample,
    read_inputs,
    said_of_models,
    teacher_layers,
)
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


@dataclass(frozen=True)
class Job:
    """What a run is about to do: all that follows from its settings and files, before any weights are loaded.

    Attributes:
        examples: the training records, encoded.
        shape: how many samples a step has.
        specs: what is asked of each teacher.
        terms: further ones of the loss, by name.
    """

    config: TrainConfig
    inputs: TrainInputs
    examples: Sequence[Example]
    shape: StepShape
    max_steps: int
    specs: Sequence[TeacherSpec]
    terms: Mapping[str, LossTerm]
    world: World
    device: torch.device


def train(config: TrainConfig, world: World, device: torch.device) -> None:
    """Checks everything, then trains, unless the run has finished already.

    Raises:
        RunError: see its kinds.
        Interrupted: a signal asked to stop; the state has been saved.
    """
    nodes = nodes_from_environment() if config.run.check_only else None
    with refusals_told(nodes):
        job = _prepare(config, world, device)
        config = job.config
        dev = build_dev_set(config, job.inputs, world)
        if config.run.check_only:
            _look(job)
        run, caches = _decide(job) if world.is_main and not config.run.check_only else (None, None)
    if config.run.check_only:
        if nodes:
            _meet(job, nodes)
        return
    with ExitStack() as stack:
        stack.enter_context(process_group(world, device, config.run.process_group_timeout))
        check_ranks(world, _what_must_agree(job, run))
        check_same_date(job.inputs.template_date, world)
        run, caches = world.gather((run, caches))[0]
        if world.size > world.local_size:
            _check_shared(config, caches, world, "rank", marks=world.local_rank == 0)
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


def _prepare(config: TrainConfig, world: World, device: torch.device) -> Job:
    """Reads and checks what the settings name. Raises InputError with every problem."""
    config = with_steps_as_before(config, world.size)
    inputs = read_inputs(config, device)
    data, optim = dataclasses.replace(config.data, template_date=inputs.template_date), config.optim
    config = dataclasses.replace(config, data=data)
    examples = encode_examples(inputs.train, inputs.student.tokenizer, inputs.student.family, data.max_length,
                               data.max_prompt_length)
    shape = StepShape(optim.batch_size, optim.accumulation(world.size), world.rank, world.size,
                      optim.step_samples(world.size))
    max_steps = min(optim.num_epochs * shape.steps(len(examples)), optim.max_steps or 2**62)
    specs = build_teacher_specs(config, inputs, examples)
    torch.manual_seed(config.run.seed)
    terms = build_loss_terms(config.objective, inputs.student, inputs.teachers)
    return Job(config, inputs, examples, shape, max_steps, specs, terms, world, device)


def _decide(job: Job) -> tuple[dict[str, Any], list[Path | None]]:
    """What args.json will hold, and for each teacher the folder of its cache if there is to be one; for the first rank.

    Raises:
        InputError: the run in the folder, or the cache, is another one.
    """
    passes = job.max_steps / job.shape.steps(len(job.examples)) * job.config.source.data_share
    caches = choose_caches(job.specs, _cache_mode(job), passes=passes, ranks=job.world.size, device=job.device,
                           earlier=_teacher_before(job))
    return _check_run(job, describe_choices(job.specs, caches), of_models=True), caches


def _look(job: Job) -> None:
    """`_decide` as far as it needs no weights: the run that follows reads them. Raises InputError like it, and where
    another run is writing to the folder."""
    _check_run(job, look_at_choices(job.specs, _cache_mode(job), _teacher_before(job)), of_models=False)
    check_unclaimed(Path(job.config.run.save_dir))


def _check_run(job: Job, teacher: str | list[str] | None, of_models: bool) -> dict[str, Any]:
    """What args.json will hold. Raises InputError where the folder has another run.

    Args:
        teacher: where its hidden states come from.
        of_models: whether the weights are looked at.
    """
    config, inputs = job.config, job.inputs
    run = describe_run(config, job.world.size, checksums(config, inputs, of_models),
                       LIVE if inputs.teacher_function else teacher, sum(inputs.train_sizes), inputs.deepspeed_config)
    if config.run.resume != "never":
        check_same_run(Path(config.run.save_dir), run, force=config.run.resume == "force")
    return run


def _cache_mode(job: Job) -> str:
    can_cache = job.config.source.uses_responses and not teacher_layers(job.terms)
    return job.config.cache.teacher_cache if can_cache else "off"


def _teacher_before(job: Job) -> str | list[str] | None:
    """Where the teachers' hidden states came from in the run that goes on, if one does."""
    earlier = None if job.config.run.resume == "never" else read_record(Path(job.config.run.save_dir))
    return earlier and earlier["deciding"].get("teacher")


def _reads_rounds(job: Job, caches: Sequence[Path | None]) -> bool:
    """Whether the teachers read the samples of a round when it begins, and keep what they found, not batch by batch."""
    config, mode = job.config, job.config.cache.teacher_cache
    if not config.source.on_policy or not job.specs or teacher_layers(job.terms):
        return False
    return mode != "off" and (mode != "auto" or config.source.replays or any(caches))


def _meet(job: Job, nodes: Nodes) -> None:
    """Compares what all nodes are about to do, before any of them starts its ranks. Weights are told by their files'
    names and sizes; the ranks compare them."""
    files = checksums(job.config, job.inputs, of_models=False)
    listed = said_of_models(job.config, job.inputs, weights_listing)
    meeting, mode = agree(nodes, _description(job, files | listed)), _cache_mode(job)
    _check_shared(job.config, [] if mode in CACHE_MODES else [Path(mode)], meeting)


def _what_must_agree(job: Job, run: Mapping[str, Any] | None) -> dict[str, str]:
    """What this rank is about to do. Rank 0 has read the weights, for `run`; the first of another node reads them where
    it sees other files than rank 0 does."""
    places = said_of_models(job.config, job.inputs, weights_place)
    elsewhere = job.world.gather(places if run else None)[0] != places
    return _description(job, run["files"] if run else
                        checksums(job.config, job.inputs, of_models=elsewhere and job.world.local_rank == 0))


def _description(job: Job, files: Mapping[str, str]) -> dict[str, str]:
    tokens = {"tokens of the training data": examples_checksum(job.examples)}
    return what_must_agree(job.config.by_name, {**files, **tokens}, job.world)


def _check_shared(config: TrainConfig, caches: Sequence[Path | None], party: Party, kind: str = "node",
                  marks: bool = True) -> None:
    """That all nodes see the folder of the run, and each cache of which one of them lacks a part: `check_shared`."""
    named = party.gather([str(cache) for cache in caches if cache])[0]
    lacking = chain(*party.gather([cache for cache in named if not is_complete(Path(cache))]))
    check_shared([Path(config.run.save_dir), *map(Path, sorted(set(lacking)))], party, kind, marks)


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
    spread = world.gather(report and report.teacher_spread)[0]
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
