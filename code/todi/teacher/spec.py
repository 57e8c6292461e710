"""What a cache of a teacher follows from, and what it is called by."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase as Tokenizer

import todi
from todi.data.tokenize import Example, examples_checksum
from todi.models.loading import checksum_or_commit, empty_model, load_config
from todi.models.tokenizers import tokenizer_checksum
from todi.runtime.checksums import file_checksum, value_checksum, weights_checksum
from todi.runtime.device import Precision, name_of
from todi.settings import TODAY, DataConfig, recorded
from todi.teacher.cache_files import Layout
from todi.teacher.choice import Estimate, estimate

CACHE_FORMAT = 1  # counts up whenever other numbers, or the same ones otherwise, are stored
SHARED_CACHES = Path("outputs/teacher_cache")


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher says about which samples: all that the contents of a cache follow from.

    Attributes:
        path: of the model, or its Hub name.
        adapter: a LoRA adapter that is merged into it.
        model_type, dtype: the family and the precision that were asked for, for the record.
        data: how much is read of the data, for the record, and how long a sample may be.
        precision: that the teacher computes in.
        stored_dtype: of the numbers in the cache.
        tokenizer: that encoded the samples.
        examples: the samples, encoded.
        train_files: that their records came from, one after the other.
    """

    path: str
    adapter: str | None
    model_type: str
    dtype: str | None
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
        return {
            "teacher weights": str(checksum_or_commit(self.path, weights_checksum, self.trust_remote_code)),
            "teacher adapter": self.adapter and weights_checksum(Path(self.adapter)),
            **self.beside_weights,
        }

    @cached_property
    def beside_weights(self) -> dict[str, Any]:
        """The part of it for which no weights are read."""
        files = [file_checksum(file) for file in self.train_files]
        return {
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "data": files[0] if len(files) == 1 else value_checksum(files),
            "records": len(self.examples),
            "max_length": self.data.max_length,
            "max_prompt_length": self.data.max_prompt_length,
            "token ids": examples_checksum(self.examples),
            "precision": self.precision.name,
            "stored dtype": name_of(self.stored_dtype),
            **({} if self.data.template_date == TODAY else {"template_date": self.data.template_date}),
            "code": f"todi {todi.__version__}, format {CACHE_FORMAT}, transformers {transformers.__version__}",
        }

    @property
    def made_from(self) -> dict[str, Any]:
        """The settings, for `todi.cache verify`; paths are absolute."""
        return {
            "teacher_model_path": _absolute(self.path),
            "teacher_model_type": self.model_type,
            "teacher_peft_path": self.adapter and _absolute(self.adapter),
            "teacher_dtype": self.dtype,
            **dataclasses.asdict(self.data),
            "data_dir": recorded([_absolute(file.parent) for file in self.train_files]),
            "precision": self.precision.name,
            "teacher_cache_dtype": name_of(self.stored_dtype),
        }

    @cached_property
    def layout(self) -> Layout:
        config = load_config(self.path, self.trust_remote_code)
        return Layout(tuple(example.response_tokens for example in self.examples), config.hidden_size,
                      self.stored_dtype)

    @property
    def teacher_name(self) -> str:
        """Last part of its path, fit for a file name."""
        return re.sub(r"[^\w.-]+", "-", Path(self.path).name)

    @property
    def cache_name(self) -> str:
        """What a folder of this cache and of no other is called."""
        return f"{self.teacher_name}-{value_checksum(self.fingerprint)[:12]}"

    @property
    def shared_folder(self) -> Path:
        """Where every run with the same fingerprint looks for its cache."""
        return SHARED_CACHES / self.cache_name

    def may_have_been_cached(self) -> bool:
        """Whether there is a cache of a teacher of that name; to name its own takes a checksum of all weights."""
        return any(SHARED_CACHES.glob(f"{self.teacher_name}-*"))

    def estimate(self, passes: float, ranks: int, device: torch.device) -> Estimate:
        """What a cache would take and save in a training of so many passes over the samples."""
        model = empty_model(load_config(self.path, self.trust_remote_code), self.trust_remote_code)
        matrices = sum(parameter.numel() for parameter in model.base_model.parameters())
        return estimate(folder=SHARED_CACHES, bytes=self.layout.bytes,
                        tokens=sum(len(example.ids) for example in self.examples),
                        parameters=matrices - model.get_input_embeddings().weight.numel(), passes=passes,
                        device=device, dtype=self.precision.dtype, ranks=ranks)


def _absolute(path: str | Path) -> str:
    """Of what lies here; a Hub name stays what it is."""
    return str(Path(path).absolute() if Path(path).exists() else path)
