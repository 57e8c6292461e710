"""The settings of teacher text."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from todi.options import option, problems
from todi.settings.decoding import DecodingConfig
from todi.settings.shared import (
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
    several_problems,
    template_date_option,
    trust_remote_code_option,
    utf8_problems,
    writing_model_option,
)


@dataclass(frozen=True)
class GenerateConfig:
    """Has a model answer the prompts of a data set, and writes a data set that training reads."""

    # MODEL_PATH is the student's in the same shell
    model_path: str | None = writing_model_option(env=())
    peft_path: str | None = adapter_option()
    trust_remote_code: bool = trust_remote_code_option()
    data_dir: tuple[str, ...] = option(("data/dolly",), "folders with the prompts: train.jsonl, with or without "
                                                        "responses, and a dev.jsonl that is taken over")
    save_dir: str = option("", "folder that gets train.jsonl, dev.jsonl and made_with.json", env="TEXT_DIR")
    limit: int | None = limit_option("folder")
    seeds: tuple[int, ...] = option((10,), "sampling seeds: each prompt has a response with each; greedy takes the "
                                           "first alone")
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
    no_repeat_ngram_size: int = no_repeat_ngram_size_option(0)
    drop_cut: bool = option(True, "leave out responses that the length limit cut off: a text without an end teaches "
                                  "not to end")
    least_tokens: int = option(1, "leave out responses of fewer tokens", least=1)
    most_tokens: int | None = option(None, "leave out responses of more tokens", least=1)
    batch_size: int = eval_batch_size_option()
    template_date: str = template_date_option()
    precision: str = precision_option(env=("TEACHER_DTYPE", "PRECISION"))
    allocator: str = allocator_option()
    process_group_timeout: int = process_group_timeout_option()
    plugins: tuple[str, ...] = plugins_option()
    check_only: bool = check_only_option()

    @property
    def streams(self) -> tuple[int, ...]:
        """The seeds that make a difference."""
        return self.decoding.streams(self.seeds)

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if not (self.model_path or self.peft_path):
            yield "--model-path or --peft-path is required"
        if not self.save_dir:
            yield "--save-dir is required"
        else:
            yield from folder_problems("--save-dir", self.save_dir)
            yield from utf8_problems("--save-dir", self.save_dir)
        yield from several_problems("--data-dir", self.data_dir)
        yield from several_problems("--seeds", self.seeds)
        yield from date_problems(self.template_date)
        if self.most_tokens is not None and self.most_tokens < self.least_tokens:
            yield f"--most-tokens ({self.most_tokens}) must not be below --least-tokens ({self.least_tokens})"

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        return problems(self)
