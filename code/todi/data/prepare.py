"""Makes instruction sets from their public sources, in the published form and split sizes.

    python -m todi.data.prepare dolly self-inst vicuna sinst/11_ uinst/11_
    python -m todi.data.prepare dolly --raw-dir downloads --tokenizer openai-community/gpt2     # from the Hub
    python -m todi.data.prepare mine --plugins my_set.py        # which registers it in todi.data.sources.SOURCES

A set is data/<set>/{train,dev,valid}.jsonl; sources.json beside has the checksums of what went in and what came out.
"""

import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from todi.data.records import check_text
from todi.data.sources import GPT2, SOURCES, WORDS, Item, RawFiles, Source
from todi.data.templates import alpaca_prompt
from todi.errors import InputError, collecting, run_main
from todi.models.loading import load_tokenizer
from todi.options import option, parse
from todi.options import problems as problems_of
from todi.python_files import load_plugins
from todi.registry import did_you_mean
from todi.runtime.checksums import file_checksum
from todi.runtime.logs import set_up_logging
from todi.runtime.storage import write_text

logger = logging.getLogger("todi.data.prepare")

Count = Callable[[str], int]


@dataclass(frozen=True)
class PrepareConfig:
    """Makes instruction sets from their public sources."""

    sets: tuple[str, ...] = option((), "dolly (with its train and dev), self-inst, vicuna, sinst/11_, uinst/11_, "
                                       "or a plugin's",
                                   flag="sets")
    raw_dir: str = option("data/raw", "the sources' own files; what is not there is downloaded to it")
    sets_dir: str = option("data", "where the sets go", flag=("--sets-dir", "--data-dir"))
    tokenizer: str | None = option(None, "a model whose tokens the length limits count, or words, which needs none; "
                                         f"{GPT2}, as published, when not given; of a plugin's set words")
    max_prompt_length: int = option(256, "longest prompt, in tokens; longer ones are left out", least=1)
    limit: int | None = option(None, "at most so many records of a split", least=1)
    seed: int = option(10, "of shuffling what has several splits")
    plugins: tuple[str, ...] = option((), "Python files that are run first, to register sets of one's own")


def main() -> None:
    """Checks all input, then makes one set after the other."""
    config = parse(PrepareConfig, prog="python -m todi.data.prepare")
    set_up_logging(is_main=True)
    load_plugins(config.plugins)
    problems = problems_of(config)
    if not config.sets:
        problems.append(f"name at least one set of {', '.join(SOURCES)}")
    for name in config.sets:
        if name not in SOURCES:
            problems.append(f"unknown set {name!r}; {did_you_mean(name, SOURCES)}allowed: {', '.join(SOURCES)}")
    if problems:
        raise InputError(problems)
    tokenizer_of = {name: config.tokenizer or SOURCES[name].tokenizer
                    for name in map(SOURCES.canonical, config.sets)}
    counters = {tokenizer: _counter(tokenizer) for tokenizer in dict.fromkeys(tokenizer_of.values())}
    for name, tokenizer in tokenizer_of.items():
        with collecting(problems):
            prepare(name, config, counters[tokenizer])
    if problems:
        raise InputError(problems)


def prepare(name: str, config: PrepareConfig, count: Count) -> None:
    """Makes one set.

    Raises:
        InputError: a file of its source is missing and cannot be downloaded, or is not of the source's form.
    """
    source, raw = SOURCES[name], RawFiles(Path(config.raw_dir))
    try:
        items = [item | {"prompt": alpaca_prompt(item["instruction"], item["input"])} for item in source.read(raw)]
        for item in items:
            _check_item(item)
        kept = [item for item in items if count(item["prompt"]) <= config.max_prompt_length
                and count(_first_response(item)) >= source.cut.shortest_response]
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{raw}: not of the form of {name} ({error!r})") from None
    except ValueError as error:
        raise InputError(f"{raw}: {error}") from None
    if not kept:
        raise InputError(f"{raw}: no item of {name} is left")
    splits = _splits(kept, source, config.seed)
    short = [f"{split} {len(records)} of {source.cut.sizes[split] or 'at least 1'}" for split, records in splits.items()
             if len(records) < (source.cut.sizes[split] or 1)]
    if short and len(splits) > 1:  # a set with a single split takes what there is
        raise InputError(f"{raw}: {len(kept)} items of {name} are too few for its splits, which would have "
                         f"{', '.join(short)}")
    folder = Path(config.sets_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, records in splits.items():
        records = records[:config.limit]
        file = folder / f"{split}.jsonl"
        write_text(file, "".join(json.dumps(record) + "\n" for record in records))
        made[file.name] = {"records": len(records), "sha256": file_checksum(file)}
    settings = {"seed": config.seed, "tokenizer": config.tokenizer or source.tokenizer, "limit": config.limit,
                "max_prompt_length": config.max_prompt_length, "shortest_response": source.cut.shortest_response}
    about = {"set": name, "licence": source.licence, "settings": settings, "sources": raw.used, "files": made}
    write_text(folder / "sources.json", json.dumps(about, indent=2) + "\n")
    logger.info("%s: %s; %d of %d items were left out by length; licence: %s", name,
                ", ".join(f"{file} {what['records']}" for file, what in made.items()), len(items) - len(kept),
                len(items), source.licence)


def _splits(items: Sequence[Item], source: Source, seed: int) -> dict[str, Sequence[Item]]:
    """Cuts a set into its files."""
    order = list(items)
    if len(source.cut.sizes) > 1:
        random.Random(seed).shuffle(order)
    splits, start = {}, 0
    for split, size in source.cut.sizes.items():
        end = len(order) if size is None else start + size
        splits[split] = order[start:end]
        start = end
    return splits


def _check_item(item: Item) -> None:
    output = item["output"]
    for text in (item["prompt"], *([output] if isinstance(output, str) else output)):
        check_text(f"the item with the instruction {item['instruction'][:60]!r}", text)


def _first_response(item: Item) -> str:
    output = item["output"]
    return output if isinstance(output, str) else next(iter(output), "")


def _counter(tokenizer: str) -> Count:
    """How many tokens a text has. Raises InputError where there is no such model."""
    if tokenizer == WORDS:
        logger.info("a token is a word or a punctuation mark: of published sets this makes others than with GPT-2's")
        return lambda text: len(re.findall(r"\w+|[^\w\s]", text))
    try:
        loaded = load_tokenizer(tokenizer)
    except InputError as error:
        raise InputError(f"{error.problems[0]}. The published sets count GPT-2's tokens: bash scripts/models/fetch.sh "
                         "gpt2-base brings them, TOKENIZER (--tokenizer) names where they are, here or on the Hub "
                         f"(openai-community/gpt2), or another model; TOKENIZER={WORDS} needs none and makes other "
                         "sets") from None
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    run_main(main)
