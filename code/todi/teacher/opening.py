"""From settings to a teacher source: whether to use a cache, and how it is made."""

import gc
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from todi.data.batches import collate
from todi.errors import InputError, StorageError
from todi.models.adapters import merge_adapter
from todi.models.loading import load_model
from todi.models.packing import use_packing
from todi.models.probe import check_model
from todi.runtime.device import name_of
from todi.runtime.distributed import World
from todi.settings import CACHE_MODES, recorded
from todi.teacher.cache_files import CacheStore
from todi.teacher.cached import CachedTeacher
from todi.teacher.choice import free_bytes
from todi.teacher.filling import fill, filling_alone
from todi.teacher.live import LiveTeacher
from todi.teacher.mean import MeanTeacher
from todi.teacher.rounds import RoundTeacher
from todi.teacher.source import TeacherSource
from todi.teacher.spec import TeacherSpec
from todi.teacher.spread import SpreadTeacher

logger = logging.getLogger(__name__)

LIVE = "live"

def choose_caches(specs: Sequence[TeacherSpec], mode: str, *, passes: float, ranks: int, device: torch.device,
                  earlier: str | Sequence[str] | None) -> list[Path | None]:
    """For each teacher what `choose_cache` says; of a folder given for several, each has one of its own in it.

    Args:
        earlier: what `describe_choices` said when this run began, if it did.
    """
    before = [earlier] if earlier is None or isinstance(earlier, str) else earlier
    if len(before) != len(specs):  # a run of other teachers
        before = [None] * len(specs)
    shared = len(specs) > 1 and mode not in CACHE_MODES
    return [choose_cache(spec, str(Path(mode) / spec.cache_name) if shared else mode, passes=passes, ranks=ranks,
                         device=device, earlier=said)
            for spec, said in zip(specs, before, strict=True)]


def choose_cache(spec: TeacherSpec, mode: str, *, passes: float, ranks: int, device: torch.device,
                 earlier: str | None) -> Path | None:
    """The folder of the cache to use, to be filled where something is missing; None to run the teacher live.

    Args:
        mode: auto, on, off, or the folder.
        passes: over the samples that training makes.
        earlier: what `describe_choice` said when this run began, if it did; `auto` keeps to it, so that a resumed
            run computes what it would have computed.

    Raises:
        InputError: there is a cache of something else in the folder; says what differs.
        CorruptCache: its description is damaged.
    """
    if mode == "off":
        return None
    if mode == "auto":
        folder = _choose_automatically(spec, passes, ranks, device, earlier)
    else:
        folder = spec.shared_folder if mode == "on" else Path(mode)
    if folder and (folder / "cache.json").is_file():
        check_match(CacheStore(folder), spec)
    return folder


def describe_choice(spec: TeacherSpec, folder: Path | None) -> str:
    """Where hidden states come from, in as far as it alters what is computed."""
    return LIVE if folder is None else f"cached in {name_of(spec.stored_dtype)}"


def describe_choices(specs: Sequence[TeacherSpec], folders: Sequence[Path | None]) -> str | list[str]:
    """`describe_choice` of the teacher; of several, a list."""
    return recorded([describe_choice(*pair) for pair in zip(specs, folders, strict=True)])


def look_at_choices(specs: Sequence[TeacherSpec], mode: str, earlier: str | Sequence[str] | None) -> (
        str | list[str] | None):
    """What `describe_choices` will say of `choose_caches`, as far as no weights are read: under `auto` what it said
    before, if it did.

    Raises:
        InputError: there is a cache of something else in the folder that `mode` names, be it of the same weights.
        CorruptCache: its description is damaged.
    """
    if mode == "auto":
        return earlier
    if mode not in CACHE_MODES and len(specs) == 1 and (Path(mode) / "cache.json").is_file():
        store = CacheStore(Path(mode))
        _refuse(store, store.differences({**store.fingerprint, **specs[0].beside_weights}))
    return describe_choices(specs, [None if mode == "off" else Path(mode)] * len(specs))


def check_match(store: CacheStore, spec: TeacherSpec) -> None:
    """Raises InputError, with every difference, when the cache is of something else than `spec`."""
    _refuse(store, store.differences(spec.fingerprint))


def _refuse(store: CacheStore, differing: Sequence[str]) -> None:
    if differing:
        raise InputError(f"the teacher cache {store.folder} is of something else: {'; '.join(differing)}. Name "
                         "another folder, or use --teacher-cache on, which finds its own")


def open_teachers(specs: Sequence[TeacherSpec], caches: Sequence[Path | None], weights: Sequence[float], world: World,
                  device: torch.device, layers: Sequence[int] = (), rounds: Path | None = None,
                  spread: bool = False) -> TeacherSource:
    """`open_teacher` of the teacher; of several, their mean.

    Args:
        weights: of each in the mean; even where there are none.
        layers: whose outputs are wanted besides; of a single teacher that has no cache.
        rounds: the folder for what they say of each round's samples, where they read these when it begins.
        spread: whether the weights of each that runs lie over the ranks.
    """
    for spec, cache in zip(specs, caches, strict=True):
        if cache:
            fill_cache(spec, cache, world, device, spread)  # while no other teacher is in memory
    sources = [open_teacher(spec, cache, world, device, layers, rounds and rounds / f"teacher{number}", spread)
               for number, (spec, cache) in enumerate(zip(specs, caches, strict=True), start=1)]
    if len(sources) == 1:
        return sources[0]
    logger.info("the teacher is the mean of %d, %s", len(sources),
                f"weighted {' : '.join(f'{weight:g}' for weight in weights)}" if weights else "evenly weighted")
    return MeanTeacher(sources, weights)


def open_teacher(spec: TeacherSpec, cache: Path | None, world: World, device: torch.device,
                 layers: Sequence[int] = (), rounds: Path | None = None, spread: bool = False) -> TeacherSource:
    """The teacher itself, or the cache that `choose_cache` named, filled first where something is missing; with a
    folder for `rounds` both.

    Raises:
        InputError, CorruptCache, StorageError: as `choose_cache`, and where the cache cannot be written.
    """
    cached = None
    if cache:
        fill_cache(spec, cache, world, device, spread)
        cached = CachedTeacher(CacheStore(cache), device)
        logger.info("teacher: read from %s (%.3g GB in %s)%s", cache, spec.layout.bytes / 1e9,
                    name_of(cached.store.dtype), "" if rounds else "; its weights are not in memory")
    if cached and not rounds:
        return cached
    live = open_live(spec, device, layers, spread)
    if not rounds:
        return live
    logger.info("teacher: reads %s once, when a round begins", "what the student writes" if cached else "its samples")
    return RoundTeacher(spec, live, cached, rounds, world, device)


def open_live(spec: TeacherSpec, device: torch.device, layers: Sequence[int] = (), spread: bool = False) -> LiveTeacher:
    """The teacher itself, whole on this device or spread over the ranks."""
    if not spread:
        return LiveTeacher(load_teacher(spec, device), layers)
    logger.info("teacher: its weights are spread over the ranks, a layer at a time is gathered")
    return SpreadTeacher(_read_teacher(spec, torch.device("cpu")), spec.path, device, layers)


def fill_cache(spec: TeacherSpec, folder: Path, world: World, device: torch.device, spread: bool = False) -> None:
    """Makes a cache, or what is missing of it; writes nothing when there is nothing missing."""
    if world.from_main(is_complete(folder)):
        return
    with filling_alone(folder, world):
        if world.from_main(is_complete(folder)):
            return  # another run has filled it meanwhile
        new = not (folder / "cache.json").is_file()
        if world.is_main and new and spec.layout.bytes > free_bytes(folder):
            raise StorageError(f"the teacher cache {folder} would take {spec.layout.bytes / 1e9:.2f} GB, and "
                               f"{free_bytes(folder) / 1e9:.2f} GB are free")
        teacher = open_live(spec, device, spread=spread)
        if world.is_main and new:
            CacheStore.create(folder, spec.fingerprint, spec.made_from, spec.layout, teacher.head)
        world.barrier()
        store = CacheStore(folder)
        if world.is_main:
            check_match(store, spec)
            store.sweep()
        world.barrier()
        logger.info("filling the teacher cache %s: %d of %d shards, %.3g GB in all", folder, len(store.missing()),
                    len(store.shards), spec.layout.bytes / 1e9)
        fill(store, teacher, spec.examples,
             partial(collate, pad_id=spec.tokenizer.pad_token_id, packed=teacher.takes_packed), world, device)
    del teacher
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_teacher(spec: TeacherSpec, device: torch.device) -> nn.Module:
    """The frozen model that is imitated, its LoRA adapter merged."""
    model = _read_teacher(spec, device)
    use_packing(model, spec.path)
    return model


def _read_teacher(spec: TeacherSpec, device: torch.device) -> nn.Module:
    """The same before anybody has asked whether it takes packed rows."""
    path, adapter = spec.path, spec.adapter
    model = load_model(path, spec.precision.dtype, device, spec.trust_remote_code)
    if adapter:
        model = merge_adapter(model, adapter)
    check_model(model, path)
    logger.info("teacher %s%s: %.1f M parameters, %s, attention: %s", path,
                f" with adapter {adapter}" if adapter else "", sum(p.numel() for p in model.parameters()) / 1e6,
                spec.precision.name, model.config._attn_implementation)
    return model


def _choose_automatically(spec: TeacherSpec, passes: float, ranks: int, device: torch.device,
                          earlier: str | None) -> Path | None:
    if earlier:
        logger.info("teacher cache of %s: %s, as when this run began", spec.path, earlier)
        return None if earlier == LIVE else spec.shared_folder
    if spec.may_have_been_cached() and is_complete(spec.shared_folder):
        return spec.shared_folder
    costs = spec.estimate(passes, ranks, device)
    against = costs.reason_against()
    logger.info("teacher cache of %s: %s: %s", spec.path, f"none, {against}" if against else "yes", costs)
    return None if against else spec.shared_folder


def is_complete(folder: Path) -> bool:
    """Whether there is a cache that misses no shard. Raises CorruptCache when its description is damaged."""
    return (folder / "cache.json").is_file() and not CacheStore(folder).missing()
