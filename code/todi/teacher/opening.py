"""From settings to a teacher source: what a cache for them must hold, whether to use one, and how it is made."""

import dataclasses
import gc
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

import todi
from todi.data.tokenize import Example, examples_checksum
from todi.errors import InputError, StorageError
from todi.models.backbone import check_head
from todi.models.loading import checksum_or_commit, empty_model, load_config, load_model, merge_adapter
from todi.models.tokenizers import tokenizer_checksum
from todi.runtime.checksums import file_checksum, weights_checksum
from todi.runtime.device import Precision, name_of
from todi.runtime.distributed import World
from todi.settings import DataConfig, TeacherConfig
from todi.teacher.cache_files import CacheStore, Layout
from todi.teacher.cached import CachedTeacher
from todi.teacher.choice import Estimate, estimate, free_bytes
from todi.teacher.filling import fill, filling_alone
from todi.teacher.live import LiveTeacher, TeacherSource

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1  # counts up whenever other numbers, or the same ones otherwise, are stored
SHARED_CACHES = Path("outputs/teacher_cache")


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher says about which samples: all that the contents of a cache follow from.

    Attributes:
        precision: that the teacher computes in.
        stored_dtype: of the numbers in the cache.
        examples: the samples, encoded.
        train_files: that their records came from.
    """

    teacher: TeacherConfig
    data: DataConfig
    precision: Precision
    stored_dtype: torch.dtype
    tokenizer: Tokenizer
    examples: Sequence[Example]
    train_files: Sequence[Path]
    trust_remote_code: bool = False

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the hidden states depend on; reads all weights once."""
        adapter = self.teacher.teacher_peft_path
        return {
            "teacher weights": str(checksum_or_commit(self.teacher.teacher_model_path, weights_checksum,
                                                      self.trust_remote_code)),
            "teacher adapter": adapter and weights_checksum(Path(adapter)),
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "data": " ".join(map(file_checksum, self.train_files)),
            "records": len(self.examples),
            "max_length": self.data.max_length,
            "max_prompt_length": self.data.max_prompt_length,
            "token ids": examples_checksum(self.examples),
            "precision": self.precision.name,
            "stored dtype": name_of(self.stored_dtype),
            "code": f"todi {todi.__version__}, format {CACHE_FORMAT}, transformers {transformers.__version__}",
        }

    @property
    def made_from(self) -> dict[str, Any]:
        """The settings, for `todi.cache verify`; paths are absolute."""
        settings = dataclasses.asdict(self.teacher) | dataclasses.asdict(self.data)
        for name in ("teacher_model_path", "teacher_peft_path"):
            if settings[name] and Path(settings[name]).exists():
                settings[name] = str(Path(settings[name]).absolute())
        folders = [str(Path(folder).absolute()) for folder in self.data.data_dir]
        settings["data_dir"] = folders if len(folders) > 1 else folders[0]
        return settings | {"precision": self.precision.name, "teacher_cache_dtype": name_of(self.stored_dtype)}

    @cached_property
    def layout(self) -> Layout:
        config = load_config(self.teacher.teacher_model_path, self.trust_remote_code)
        return Layout(tuple(example.response_tokens for example in self.examples), config.hidden_size,
                      self.stored_dtype)

    @property
    def shared_folder(self) -> Path:
        """Where every run with the same fingerprint looks for its cache."""
        digest = hashlib.sha256(json.dumps(self.fingerprint).encode()).hexdigest()
        return SHARED_CACHES / f"{self.teacher_name}-{digest[:12]}"

    @property
    def teacher_name(self) -> str:
        """Last part of its path, fit for a file name."""
        return re.sub(r"[^\w.-]+", "-", Path(self.teacher.teacher_model_path).name)

    def estimate(self, passes: float, ranks: int, device: torch.device) -> Estimate:
        """What a cache would take and save in a training of so many passes over the samples."""
        model = empty_model(load_config(self.teacher.teacher_model_path, self.trust_remote_code),
                            self.trust_remote_code)
        matrices = sum(parameter.numel() for parameter in model.base_model.parameters())
        return estimate(folder=SHARED_CACHES, bytes=self.layout.bytes,
                        tokens=sum(len(example.ids) for example in self.examples),
                        parameters=matrices - model.get_input_embeddings().weight.numel(), passes=passes,
                        device=device, dtype=self.precision.dtype, ranks=ranks)


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
    return "live" if folder is None else f"cached in {name_of(spec.stored_dtype)}"


def check_match(store: CacheStore, spec: TeacherSpec) -> None:
    """Raises InputError, with every difference, when the cache is of something else than `spec`."""
    differing = store.differences(spec.fingerprint)
    if differing:
        raise InputError(f"the teacher cache {store.folder} is of something else: {'; '.join(differing)}. Name "
                         "another folder, or use --teacher-cache on, which finds its own")


def open_teacher(spec: TeacherSpec, cache: Path | None, world: World, device: torch.device) -> TeacherSource:
    """The teacher itself, or the cache that `choose_cache` named, filled first where something is missing.

    Raises:
        InputError, CorruptCache, StorageError: as `choose_cache`, and where the cache cannot be written.
    """
    if cache is None:
        return LiveTeacher(load_teacher(spec, device))
    fill_cache(spec, cache, world, device)
    store = CacheStore(cache)
    logger.info("teacher: read from %s (%.3g GB in %s); its weights are not in memory", cache,
                spec.layout.bytes / 1e9, name_of(store.dtype))
    return CachedTeacher(store, device)


def fill_cache(spec: TeacherSpec, folder: Path, world: World, device: torch.device) -> None:
    """Makes a cache, or what is missing of it; writes nothing when there is nothing missing."""
    if world.gather(_is_complete(folder))[0]:
        return
    with filling_alone(folder, world):
        if world.gather(_is_complete(folder))[0]:
            return  # another run has filled it meanwhile
        new = not (folder / "cache.json").is_file()
        if world.is_main and new and spec.layout.bytes > free_bytes(folder):
            raise StorageError(f"the teacher cache {folder} would take {spec.layout.bytes / 1e9:.2f} GB, and "
                               f"{free_bytes(folder) / 1e9:.2f} GB are free")
        teacher = LiveTeacher(load_teacher(spec, device))
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
        fill(store, teacher, spec.examples, spec.tokenizer.pad_token_id, world, device)
    del teacher
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_teacher(spec: TeacherSpec, device: torch.device) -> nn.Module:
    """The frozen model that is imitated, its LoRA adapter merged."""
    path, adapter = spec.teacher.teacher_model_path, spec.teacher.teacher_peft_path
    model = load_model(path, spec.precision.dtype, device, spec.trust_remote_code)
    if adapter:
        model = merge_adapter(model, adapter)
    check_head(model, path)
    logger.info("teacher %s%s: %.1f M parameters, %s, attention: %s", path,
                f" with adapter {adapter}" if adapter else "", sum(p.numel() for p in model.parameters()) / 1e6,
                spec.precision.name, model.config._attn_implementation)
    return model


def _choose_automatically(spec: TeacherSpec, passes: float, ranks: int, device: torch.device,
                          earlier: str | None) -> Path | None:
    if earlier:
        logger.info("teacher cache: %s, as when this run began", earlier)
        return None if earlier == "live" else spec.shared_folder
    # to name the cache takes a checksum of all weights, so only where there may be one
    if any(SHARED_CACHES.glob(f"{spec.teacher_name}-*")) and _is_complete(spec.shared_folder):
        return spec.shared_folder
    costs = spec.estimate(passes, ranks, device)
    against = costs.reason_against()
    logger.info("teacher cache: %s: %s", f"none, {against}" if against else "yes", costs)
    return None if against else spec.shared_folder


def _is_complete(folder: Path) -> bool:
    return (folder / "cache.json").is_file() and not CacheStore(folder).missing()
