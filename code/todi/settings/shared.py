"""What the settings of several commands share: allowed values, declarations, checks."""

import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from todi.options import Names, option

CROSS_ENTROPY = "cross_entropy"
CRITERIA = (CROSS_ENTROPY, "vanilla_kd")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
RESUME = ("auto", "force", "never")
ALLOCATORS = ("auto", "glibc", "system")
OWN_DTYPE = "own"
CACHE_DTYPES = (OWN_DTYPE, "bf16", "fp16", "fp32")
KERNELS = ("auto", "triton", "compile", "eager")
CACHE_MODES = ("auto", "on", "off")
PACKING = ("auto", "off")
# a relative path, spelled plainly, that stays below the folder it is joined to
SET_NAME = r"(?!\.{1,2}(/|\Z))[^/]+(/(?!\.{1,2}(/|\Z))[^/]+)*"
NO_ADAPTER = "none"
TODAY = "today"
AUTO_TOKENIZER = "auto"
ROUGE_TOKENIZERS = (AUTO_TOKENIZER, "rouge_score", "words", "characters")


def max_length_option() -> Any:
    return option(512, "longest prompt + response, in tokens")


def max_prompt_length_option() -> Any:
    return option(256, "longest prompt, in tokens; the rest of it is cut off", least=1)


def template_date_option() -> Any:
    return option(TODAY, "the date for chat templates that write one; today is that of the first start, also when a "
                         "run or an evaluation goes on later",
                  pattern=(r"today|\d{4}-\d\d-\d\d", "today or 2026-01-31"))


def utf8_problems(flag: str, folder: str) -> Iterator[str]:
    """What is wrong with the name of a folder that is written to: bytes that are no UTF-8 stand in it as surrogates."""
    if any("\ud800" <= letter <= "\udfff" for letter in folder):
        yield f"{flag} must be UTF-8, got {ascii(folder)}"


def date_problems(template_date: str) -> Iterator[str]:
    """What is wrong with a date."""
    try:
        datetime.date.fromisoformat(template_date)
    except ValueError as error:
        if template_date != TODAY:
            yield f"--template-date {template_date}: {error}"


def response_problems(max_prompt_length: int, max_length: int) -> Iterator[str]:
    """What is wrong with two lengths in tokens."""
    if max_prompt_length >= max_length:
        yield (f"--max-prompt-length ({max_prompt_length}) must be below --max-length "
               f"({max_length}), or no room is left for a response")


def folder_problems(flag: str, path: str) -> Iterator[str]:
    """What is wrong with a folder that is to be written to."""
    place = Path(path)
    there = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not there.is_dir():
        yield f"{flag} {path}: {there} is no folder"


def several_problems(flag: str, values: Sequence[object]) -> Iterator[str]:
    """What is wrong with a list that needs one at least, and each once."""
    if not values:
        yield f"{flag} needs at least one"
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        yield f"{flag}: {', '.join(repeated)} given more than once"


def writing_model_option(env: Names | None = None) -> Any:
    return option(None, "a model folder, a GGUF file, or a Hub name; an adapter names its own", env=env)


def adapter_option() -> Any:
    # no variable for what the launchers are told by words: that of a training may be set in the same shell
    return option(None, "a LoRA adapter, merged into --model-path or into the base that it names", env=())


def limit_option(of: str) -> Any:
    return option(None, f"use only the first so many records of each {of}", least=1)


def no_repeat_ngram_size_option(default: int) -> Any:
    return option(default, "n-grams of this size may occur once only; 0 is off", least=0)


def eval_batch_size_option() -> Any:
    return option(0, "responses written together in an evaluation, per device; 0: as many as 4 GiB of keys and values "
                     "hold, at most 256", least=0, env="EVAL_BATCH_SIZE", may_change=True)


def rouge_tokenizer_option() -> Any:
    return option(AUTO_TOKENIZER, "tokens of ROUGE-L (todi/evaluation/rouge_tokens.py); auto: as published, unless "
                                  "more than a tenth of the references' letters are not Latin",
                  choices=ROUGE_TOKENIZERS)


def precision_option(env: Names | None = None) -> Any:
    return option("auto", "compute precision; auto asks the device", choices=PRECISIONS, env=env)


def allocator_option() -> Any:
    return option("auto", "on a CPU, whether memory that is freed is kept for the next step: auto keeps it by the "
                          "library that a launcher loads (tcmalloc, mimalloc); glibc by C's own, in more memory; "
                          "system gives it back", choices=ALLOCATORS,
                  may_change=True)


def trust_remote_code_option() -> Any:
    return option(False, "run Python code that comes with a model; only for models you trust")


def teacher_cache_dtype_option() -> Any:
    return option(OWN_DTYPE, "numbers of the teacher cache; own, the teacher's, is exact", choices=CACHE_DTYPES,
                  may_change=True)


def process_group_timeout_option() -> Any:
    return option(7200, "seconds that processes wait for one another before they give up", least=1, at_most=10_000_000,
                  may_change=True)


def plugins_option() -> Any:
    return option((), "Python files that are run first, to register what is one's own")


def check_only_option() -> Any:
    return option(False, "check all input, then stop before any weights are loaded", may_change=True)


def recorded(values: Sequence[Any]) -> Any:
    """Values as args.json and caches hold them where there used to be one at most: a single one by itself."""
    return list(values) if len(values) > 1 else values[0] if values else None


def named_numbers(words: tuple[str, ...]) -> dict[str, float]:
    """('beta=0.5',) -> {'beta': 0.5}. Raises ValueError for a word that is not name=number."""
    params = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            params[name] = float(value)
        except ValueError:
            raise ValueError(f"expected name=number, got {word!r}") from None
    return params
