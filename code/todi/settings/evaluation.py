"""The settings of an evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from todi.options import option, problems
from todi.settings.published import EVALUATION_OPTIONS
from todi.settings.shared import (
    SET_NAME,
    allocator_option,
    check_only_option,
    date_problems,
    eval_batch_size_option,
    folder_problems,
    max_length_option,
    max_prompt_length_option,
    plugins_option,
    precision_option,
    process_group_timeout_option,
    response_problems,
    rouge_tokenizer_option,
    template_date_option,
    trust_remote_code_option,
)


@dataclass(frozen=True)
class EvalConfig:
    """Scores a checkpoint by ROUGE-L on instruction sets, over several sampling seeds."""

    model_path: str | None = option(None, "a model folder, a GGUF file, or a Hub name; an adapter names its own")
    # no variables for what the launchers are told by words: those of a training may be set in the same shell
    peft_path: str | None = option(None, "a LoRA adapter, merged into --model-path or into the base that it names",
                                   env=())
    trust_remote_code: bool = trust_remote_code_option()
    sets_dir: str = option("data", "folder with a folder for each set", flag=("--sets-dir", "--data-dir"),
                           env=("SETS_DIR", "DATA_DIR"))
    sets: tuple[str, ...] = option(("dolly", "self-inst", "vicuna", "sinst/11_", "uinst/11_"),
                                   "sets to score; one that is not there is named and skipped",
                                   pattern=(SET_NAME, "the plain name of a folder below --sets-dir"))
    limit: int | None = option(None, "use only the first so many records of each set", least=1)
    seeds: tuple[int, ...] = option((10, 20, 30, 40, 50), "sampling seeds; greedy takes the first alone")
    batch_size: int = eval_batch_size_option()
    max_length: int = max_length_option()
    max_new_tokens: int = option(256, "longest response, in tokens", least=1)
    max_prompt_length: int = max_prompt_length_option()
    template_date: str = template_date_option()
    do_sample: bool = option(True, "sample; else greedy or beam search")
    num_beams: int = option(1, "beams of the beam search, with --no-do-sample", least=1)
    temperature: float = option(1.0, "sampling temperature", above=0)
    top_p: float = option(1.0, "sample from the smallest set of tokens with this mass; 1 is off", above=0, at_most=1)
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off", least=0)
    no_repeat_ngram_size: int = option(6, "n-grams of this size may occur once only; 0 is off", least=0)
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
        return self.seeds if self.do_sample else self.seeds[:1]

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
        for name in ("sets", "seeds"):
            values = getattr(self, name)
            if not values:
                yield f"--{name} needs at least one"
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated:
                yield f"--{name}: {', '.join(repeated)} given more than once"
        yield from response_problems(self.max_prompt_length, self.max_length)
        yield from date_problems(self.template_date)
        if self.do_sample and self.num_beams > 1:
            yield f"--num-beams {self.num_beams} needs --no-do-sample"

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        return problems(self)
