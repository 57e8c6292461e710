"""What a `todi.ToDiTrainer` is taught by: a model, or the cache of one, for a data set of `encode_file`."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import HeadRows
from todi.criterions.linear import IGNORE_INDEX
from todi.data.chat import render
from todi.data.records import load_records
from todi.data.template_date import TemplateDate
from todi.data.tokenize import Example, encode_examples, examples_checksum
from todi.errors import InputError
from todi.models.backbone import backbone_and_head, labelled_rows
from todi.models.families import family_of
from todi.models.probe import check_model
from todi.teacher.cache_files import CacheStore

SAMPLES = "sample_ids"  # the column that says which samples of a teacher cache a batch has


def encode_file(file: str | PathLike, tokenizer: Tokenizer, *, model_type: str, max_length: int = 512,
                max_prompt_length: int = 256) -> list[dict[str, Any]]:
    """The records of a JSON-lines file as this project encodes them, for a Trainer: prompts carry no label.

    Args:
        model_type: of the student, `model.config.model_type`: some families begin with BOS.

    Returns:
        `input_ids` and `labels` of each record, and `sample_ids`, its number, by which a teacher cache knows it.

    Raises:
        InputError: the file is missing or has bad lines.
    """
    records = render(load_records(file), tokenizer, Path(file), TemplateDate())
    examples = encode_examples(records, tokenizer, family_of("auto", model_type), max_length, max_prompt_length)
    return [{"input_ids": list(example.ids), SAMPLES: example.sample_id,
             "labels": [IGNORE_INDEX] * example.prompt_length + list(example.ids[example.prompt_length:])}
            for example in examples]


class LiveModel:
    """A teacher that is run on every batch."""

    def __init__(self, model: nn.Module):
        check(model)
        self.backbone, self.head = backbone_and_head(model.eval().requires_grad_(False))

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, Any], rows: Tensor, samples: Tensor | None) -> HeadRows:
        return HeadRows(labelled_rows(self.backbone, inputs, rows), self.head)


class CachedModel:
    """A teacher's hidden states, made by `python -m todi.cache build` for the samples of `dataset`."""

    def __init__(self, folder: Path, device: torch.device, dataset: Any):
        store = CacheStore(folder)
        self.store, self.device, self.head = store, device, store.head(device)
        if store.missing():
            raise InputError(f"the teacher cache {store.folder} is not complete; python -m todi.cache build goes on")
        examples = [_as_example(row) for row in dataset]
        if store.fingerprint["token ids"] != examples_checksum(examples):
            raise InputError(f"the teacher cache {store.folder} is of other samples than train_dataset; make it of the "
                             "same file, lengths and tokenizer, and the data set by todi.encode_file")

    def rows(self, inputs: Mapping[str, Any], rows: Tensor, samples: Tensor | None) -> HeadRows:
        """Raises InputError where a batch does not say which samples it has."""
        if samples is None:
            raise InputError(f"with a teacher cache every batch needs {SAMPLES}; the data collator must keep them")
        return HeadRows(self.store.read(samples.tolist()).to(self.device), self.head)


def check(model: nn.Module, trained: bool = False) -> None:
    """Whether hidden states and head give the logits of a model, and so on. Raises InputError."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # ZeRO-3 has taken them apart
        check_model(model, getattr(model, "name_or_path", "") or type(model).__name__, trained)


def _as_example(row: Mapping[str, Any]) -> Example:
    """As it was encoded: its labels begin behind the prompt."""
    labels = list(row["labels"])
    prompt = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return Example(tuple(row["input_ids"]), prompt)
