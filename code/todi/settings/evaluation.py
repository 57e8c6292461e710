"""The settings of an evaluation."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from todi.options import option, problems
from todi.settings.decoding import DecodingConfig
from todi.settings.published import EVALUATION_OPTIONS
from todi.settings.shared import (
    SET_NAME,
    adapter_option,
    allocator_option,
    check_only_option,
    date_problems,
    eval_batch_size_option,
    folder_problems,
    limit_option,
    no_repeat_ngram_size_option,
    plugins_option,
    precision_option,
    process_group_timeout_option,
    rouge_tokenizer_option,
    several_problems,
    template_date_option,
    trust_remote_code_option,
    writing_model_option,
)


@dataclass(frozen=True)
class EvalConfig:
    """Scores a checkpoint by ROUGE-L on instruction sets, over several sampling seeds."""

    model_path: str | None = writing_model_option()
    peft_path: str | None = adapter_option()
    trust_remote_code: bool = trust_remote_code_option()
    sets_dir: str = option("data", "folder with a folder for each set", flag=("--sets-dir", "--data-dir"),
                           env=("SETS_DIR", "DATA_DIR"))
    sets: tuple[str, ...] = option(("dolly", "self-inst", "vicuna", "sinst/11_", "uinst/11_"),
                                   "sets to score; one that is not there is named and skipped",
                                   pattern=(SET_NAME, "the plain name of a folder below --sets-dir"))
    limit: int | None = limit_option("set")
    seeds: tuple[int, ...] = option((10, 20, 30, 40, 50), "sampling seeds; greedy takes the first alone")
    batch_size: int = eval_batch_size_option()
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
    max_new_tokens: int = option(256, "longest response, in tokens", least=1)
    no_repeat_ngram_size: int = no_repeat_ngram_size_option(6)
    template_date: str = template_date_option()
    rouge_tokenizer: str = rouge_tokenizer_option()
    precision: str = precision_option()
    allocator: str = allocator_option()
    process_group_timeout: int = process_group_timeout_option()
    save_dir: str | None = option(None, "folder for eval/; the checkpoint's own when not given", env=())
    plugins: tuple[str, ...] = plugins_option()
    check_only: bool = check_only_option()
    INSTEAD: ClassVar[Mapping[str, str]] = EVALUATION_OPTIONS

    @property
    def streams(self) -> tuple[int, ...]:
        """The seeds that make a difference."""
        return self.decoding.streams(self.seeds)

    @property
    def folder(self) -> Path:
        """Where eval/ goes."""
        return Path(self.save_dir or self.peft_path or self.model_path)

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if not (self.model_path or self.peft_path):
            yield "--model-path or --peft-path is required"
        elif not (self.save_dir or self.peft_path or Path(self.model_path).is_dir()):
            yield f"--save-dir is required: {self.model_path} is no folder that results could go to"
        if self.save_dir:
            yield from folder_problems("--save-dir", self.save_dir)
        yield from several_problems("--sets", self.sets)
        yield from several_problems("--seeds", self.seeds)
        yield from date_problems(self.template_date)

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        return problems(self)
