"""What a run is about to do, and whether it may: read and decided before any weights are loaded, and agreed on by all.

A check before the start looks at as much of it as takes no reading of weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from todi.criterions import LossTerm
from todi.data.plans import StepShape
from todi.data.tokenize import Example, encode_examples, examples_checksum
from todi.errors import InputError, collecting
from todi.runtime.checksums import read_together, value_checksum, weights_place, weights_sizes
from todi.runtime.distributed import World
from todi.runtime.locks import check_unclaimed
from todi.runtime.nodes import Nodes, agree, what_must_agree
from todi.runtime.shared_folders import Party, check_shared
from todi.settings import CACHE_MODES, TrainConfig
from todi.teacher.opening import LIVE, choose_caches, describe_choices, is_complete, look_at_choices
from todi.teacher.spec import TeacherSpec
from todi.training.building import build_teacher_specs
from todi.training.record import check_same_run, describe_run, read_record, with_steps_as_before
from todi.training.train_inputs import (
    TrainInputs,
    build_loss_terms,
    checksums,
    model_paths,
    read_inputs,
    said_of_models,
    teacher_layers,
)


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


def prepare(config: TrainConfig, world: World, device: torch.device) -> Job:
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


def decide(job: Job) -> tuple[dict[str, Any], list[Path | None]]:
    """What args.json will hold, and for each teacher the folder of its cache if there is to be one.

    Raises:
        InputError: the run in the folder, or the cache, is another one.
    """
    passes = job.max_steps / job.shape.steps(len(job.examples)) * job.config.source.data_share
    caches = choose_caches(job.specs, _cache_mode(job), passes=passes, ranks=job.world.size, device=job.device,
                           earlier=_teacher_before(job))
    return _check_run(job, describe_choices(job.specs, caches), of_models=True), caches


def decide_together(job: Job) -> tuple[dict[str, Any], list[Path | None]]:
    """What the first rank decides, on every rank; that it is refused, too."""
    _read_weights(job)
    problems: list[str] = []
    decided = None
    if job.world.is_main:
        with collecting(problems):
            decided = decide(job)
    if problems := job.world.from_main(problems):
        raise InputError(problems)
    return job.world.from_main(decided)


def look(job: Job) -> None:
    """`decide` as far as it needs no weights: the run that follows reads them. Raises InputError like it, and where
    another run is writing to the folder."""
    _check_run(job, look_at_choices(job.specs, _cache_mode(job), _teacher_before(job)), of_models=False)
    check_unclaimed(Path(job.config.run.save_dir))


def meet(job: Job, nodes: Nodes) -> None:
    """Compares what all nodes are about to do, before any of them starts its ranks. Weights are told by their files'
    names and sizes; the ranks compare them."""
    files = checksums(job.config, job.inputs, of_models=False)
    for model in _models_here(job):
        files |= weights_sizes(model)
    meeting, mode = agree(nodes, _description(job, files)), _cache_mode(job)
    # several have a folder each in the one that is named, called by their checksums: the run looks at those
    named = mode not in CACHE_MODES and len(job.specs) == 1
    check_same_folders(job.config, [Path(mode)] if named else [], meeting)


def about_to_do(job: Job, run: Mapping[str, Any]) -> dict[str, str]:
    """What this rank is about to do, by name; the first of a node says of the weights as well."""
    return _description(job, run["files"] if job.world.is_main else
                        checksums(job.config, job.inputs, of_models=job.world.local_rank == 0))


def check_same_folders(config: TrainConfig, caches: Sequence[Path | None], party: Party, kind: str = "node",
                       marks: bool = True) -> None:
    """That all nodes see the folder of the run, and each cache of which one of them lacks a part: `check_shared`."""
    named = party.gather([str(cache) for cache in caches if cache])[0]
    lacking = chain(*party.gather([cache for cache in named if not is_complete(Path(cache))]))
    check_shared([Path(config.run.save_dir), *map(Path, sorted(set(lacking)))], party, kind, marks)


def _read_weights(job: Job) -> None:
    """Takes the checksums of all weights: the first ranks of all nodes at the same time. Those that see the same files,
    in a folder that they share, read a part of them each."""
    world, reads = job.world, job.world.local_rank == 0
    place = value_checksum(said_of_models(job.config, job.inputs, weights_place)) if reads else f"rank {world.rank}"
    places = world.gather(place)
    fellows = [rank for rank, one in enumerate(places) if one == place]

    def of_fellows(own: list[bytes]) -> list[list[bytes]]:
        if len(set(places)) == len(places):  # nobody shares
            return [own]
        told = world.gather(own if len(fellows) > 1 else [])  # the longest has its length sent for every rank
        return [own if rank == world.rank else told[rank] for rank in fellows]

    read_together(_models_here(job) if reads else [], fellows.index(world.rank), len(fellows), of_fellows)


def _models_here(job: Job) -> list[Path]:
    """The models and adapters that lie here; of one on the Hub the commit is known."""
    return [path for path in map(Path, model_paths(job.inputs)) if path.exists()]


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


def _description(job: Job, files: Mapping[str, str]) -> dict[str, str]:
    tokens = {"tokens of the training data": examples_checksum(job.examples)}
    return what_must_agree(job.config.by_name, {**files, **tokens}, job.world)
