"""Makes a teacher cache ahead of training, describes one, or compares one with its teacher.

    python -m todi.cache build DIR --teacher-model-path TEACHER --data-dir data/dolly [--precision bf16]
    python -m todi.cache info DIR
    python -m todi.cache verify DIR

`build` takes the settings that the training will have; under torchrun the ranks share the work, and what is there
already stays. `verify` checks every checksum, then runs the teacher again over a random sample; it exits with 1 when
anything is wrong. It finds teacher and data where the cache was made from them; options say where they are now.
"""

import dataclasses
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from todi.data.batches import collate
from todi.data.chat import render_sets
from todi.data.records import load_sets
from todi.data.template_date import TemplateDate
from todi.data.tokenize import encode_examples
from todi.errors import InputError, collecting, run_main
from todi.models.inputs import read_model
from todi.options import check, parse
from todi.python_files import load_plugins
from todi.runtime.allocator import settle_allocator
from todi.runtime.device import choose_device, choose_precision, dtype_of, name_of
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.runtime.heartbeat import start_heart
from todi.runtime.logs import set_up_logging
from todi.settings import CacheConfig
from todi.teacher.cache_files import CacheStore
from todi.teacher.filling import BATCH_TOKENS, batch_rows, batches
from todi.teacher.live import LiveTeacher
from todi.teacher.opening import check_match, fill_cache, load_teacher
from todi.teacher.spec import TeacherSpec

logger = logging.getLogger("todi.cache")

# Relative difference of a sample's hidden states that another machine's arithmetic may make.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def main() -> None:
    """Parse, check, do."""
    config = parse(CacheConfig, prog="python -m todi.cache")
    world = world_from_environment()
    start_heart(world)
    set_up_logging(world.is_main)
    check(config)
    device = choose_device(world.local_rank)
    settle_allocator(config.allocator, device)
    if config.command == "build":
        build(config, world, device)
    elif config.command == "info":
        info(CacheStore(Path(config.folder)))
    else:
        verify(config, CacheStore(Path(config.folder)), device)


def build(config: CacheConfig, world: World, device: torch.device) -> None:
    """Makes the cache, or what is missing of it."""
    spec = read_teacher_spec(config, device)
    folder = Path(config.folder)
    if (folder / "cache.json").is_file():
        check_match(CacheStore(folder), spec)
    with process_group(world, device) if world.size > 1 else nullcontext():
        fill_cache(spec, folder, world, device)
    logger.info("%s is complete: %d samples, %.3f GB", folder, len(spec.examples), spec.layout.bytes / 1e9)


def info(store: CacheStore) -> None:
    """Prints what the cache is of, and how far it is filled."""
    missing = store.missing()
    state = f"{len(missing)} of {len(store.shards)} shards are missing" if missing else "complete"
    rows = "" if missing else f", {sum(place.rows for place in store.places):,} positions"
    size = sum(file.stat().st_size for file in store.folder.rglob("*") if file.is_file())
    print(f"{store.folder}: {state}; {store.shards[-1].stop} samples{rows}; {store.width} numbers a position in "
          f"{name_of(store.dtype)}; {size / 1e9:.3f} GB")
    for name, value in (store.fingerprint | store.made_from).items():
        print(f"  {name}: {value}")


def verify(config: CacheConfig, store: CacheStore, device: torch.device) -> None:
    """Checks all checksums and a random sample of the numbers; exits with 1 after a line for each thing wrong."""
    wrong = list(store.check())
    missing = store.missing()
    if missing:
        wrong.append(f"{store.folder} is not complete: {len(missing)} of {len(store.shards)} shards are missing")
    if not wrong:
        logger.info("%s: all checksums are right", store.folder)
        wrong = list(_recompute(config, store, device))
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if wrong:
        sys.exit(1)


def read_teacher_spec(config: CacheConfig, device: torch.device) -> TeacherSpec:
    """Reads what the settings name, short of weights. Raises InputError with every problem."""
    load_plugins(config.plugins)
    problems: list[str] = []
    train_files = [Path(folder) / "train.jsonl" for folder in config.data.data_dir]
    sets = model = precision = None
    with collecting(problems):
        sets = load_sets(train_files, config.data.train_num)
    with collecting(problems):
        precision = choose_precision(config.teacher.teacher_dtype or config.precision, device)
    with collecting(problems):
        model = read_model(*config.teacher.teacher_model_path, config.teacher.teacher_model_type,
                           *config.teacher.adapters, precision, config.data.max_length, config.trust_remote_code)
    if problems:
        raise InputError(problems)
    date = TemplateDate(config.data.template_date, _earlier_date(Path(config.folder)))
    records = list(chain(*render_sets(sets, model.tokenizer, train_files, date)))
    examples = encode_examples(records, model.tokenizer, model.family, config.data.max_length,
                               config.data.max_prompt_length)
    return TeacherSpec(model.path, model.adapter, config.teacher.teacher_model_type, config.teacher.teacher_dtype,
                       dataclasses.replace(config.data, template_date=date.noted), precision,
                       dtype_of(config.teacher_cache_dtype, precision.dtype), model.tokenizer,
                       examples, train_files, config.trust_remote_code)


def _earlier_date(folder: Path) -> str | None:
    """Of the cache that is gone on with, if there is one."""
    return CacheStore(folder).made_from.get("template_date") if (folder / "cache.json").is_file() else None


def _recompute(config: CacheConfig, store: CacheStore, device: torch.device) -> Iterator[str]:
    """Runs the teacher again, in the batches that the cache was made in; a sentence for each sample that differs."""
    spec = read_teacher_spec(_as_made(config, store), device)
    check_match(store, spec)
    chosen = set(random.Random(config.seed).sample(range(len(spec.examples)),
                                                   min(config.samples, len(spec.examples))))
    teacher = LiveTeacher(load_teacher(spec, device))
    batch = partial(collate, pad_id=spec.tokenizer.pad_token_id, packed=teacher.takes_packed)  # as it was filled
    tolerance = max(_TOLERANCE[store.dtype], _TOLERANCE[spec.precision.dtype])
    differences = []
    for shard in store.shards:
        for samples in batches(spec.examples, shard, BATCH_TOKENS[device.type]):
            if chosen.isdisjoint(samples):
                continue
            hidden = batch_rows(teacher, spec.examples, samples, batch, device)
            for sample in chosen.intersection(samples):
                differences.append(_difference(store.read([sample]), hidden[sample].to(store.dtype)))
                if not differences[-1] <= tolerance:
                    yield f"sample {sample}: the teacher's hidden states differ by {differences[-1]:.2g}"
    if differences:
        logger.info("%d samples computed again: %d equal to the last bit, largest relative difference %.2g",
                    len(differences), differences.count(0), max(differences))


def _difference(stored: Tensor, computed: Tensor) -> float:
    return ((computed.double() - stored.double()).norm() / stored.double().norm()).item()


def _as_made(config: CacheConfig, store: CacheStore) -> CacheConfig:
    """The settings that the cache was made with, but for those that were given now."""

    def recalled(part: Any) -> dict[str, Any]:
        return {field.name: as_option(store.made_from[field.name], field.default) for field in dataclasses.fields(part)
                if field.name in store.made_from and getattr(part, field.name) == field.default}

    def as_option(value: Any, default: Any) -> Any:
        if not isinstance(default, tuple):
            return value
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)

    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **recalled(config.teacher)),
                               data=dataclasses.replace(config.data, **recalled(config.data)), **recalled(config))


if __name__ == "__main__":
    run_main(main)
