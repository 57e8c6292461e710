"""Tiny teachers and what they say: what the tests of the teacher cache stand on."""

import dataclasses
from functools import partial
from pathlib import Path

import torch
from launching import Workshop
from todi.data.batches import collate
from todi.data.records import load_records
from todi.data.tokenize import encode_examples
from todi.models.adapters import add_lora
from todi.models.families import family_of
from todi.models.loading import load_model, load_tokenizer
from todi.runtime.device import Precision
from todi.runtime.distributed import World
from todi.settings import DataConfig
from todi.teacher.cache_files import CacheStore
from todi.teacher.cached import CachedTeacher
from todi.teacher.filling import fill
from todi.teacher.live import LiveTeacher
from todi.teacher.opening import load_teacher
from todi.teacher.spec import TeacherSpec

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1)
SPECIAL = {"gemma3_text": {"final_logit_softcapping": 5.0}}


def teacher_spec_of(workshop: Workshop, family: str = "gpt2", adapter: Path | None = None, train_num: int | None = None,
              **changes: object) -> TeacherSpec:
    """What a tiny teacher of a family says about the workshop's samples."""
    path = workshop.model(f"cache-{family}-teacher", family=family, hidden=48, vocab=320, seed=1,
                          **SPECIAL.get(family, {}))
    data = DataConfig(data_dir=(str(workshop.data),), max_length=64, max_prompt_length=48, train_num=train_num)
    tokenizer, file = load_tokenizer(str(path)), workshop.data / "train.jsonl"
    examples = encode_examples(load_records(file, train_num), tokenizer, family_of("auto", family), 64, 48)
    spec = TeacherSpec(str(path), adapter and str(adapter), "auto", None, data, Precision("fp32", "test"),
                       torch.float32, tokenizer, examples, [file])
    return dataclasses.replace(spec, **changes)


def filled_by(spec: TeacherSpec, folder: Path, batch_tokens: int, packed: bool = False) -> CachedTeacher:
    """The teacher source of a new cache whose batches have so many tokens."""
    folder.mkdir()
    live = LiveTeacher(load_teacher(spec, CPU))
    store = CacheStore.create(folder, spec.fingerprint, spec.made_from, spec.layout, live.head)
    batch = partial(collate, pad_id=spec.tokenizer.pad_token_id, packed=packed)
    fill(store, live, spec.examples, batch, ALONE, CPU, batch_tokens)
    return CachedTeacher(CacheStore(folder), CPU)


def make_adapter(teacher: str, folder: Path) -> Path:
    """A LoRA adapter on a tiny GPT-2 that changes what it says, in `folder`."""
    model = add_lora(load_model(teacher, torch.float32, CPU), family_of("auto", "gpt2"), 4, 8, 0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return folder


def flip(file: Path, position: int) -> None:
    """Flips the lowest bit of one byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
