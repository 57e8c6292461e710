"""Scores a checkpoint on every set with every seed, in one process a device that loads the model once.

    python -m todi.evaluate --model-path CKPT --sets-dir data --sets dolly self-inst vicuna --seeds 10 20 30
    python -m todi.evaluate --peft-path ADAPTER

A set is <sets-dir>/<set>/valid.jsonl. Results go to eval/ beside the checkpoint or in --save-dir. What is finished
there is not done again and what was interrupted goes on, as long as settings, model and data are the same.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from todi.data.records import Record
from todi.data.template_date import check_same_date, noted_date
from todi.errors import run_main
from todi.evaluation.eval_inputs import EvalInputs, decoding_of, read_inputs
from todi.evaluation.results import (
    annotated_table,
    average,
    example_scores,
    named_tokenizer,
    summarise,
    write_results,
)
from todi.evaluation.scoring import mean_loss, score
from todi.evaluation.set_files import Done, SetStore
from todi.generation.decoding import stop_ids
from todi.generation.together import rows_written_together
from todi.generation.writer import Layout, Writer, progress_bar
from todi.generation.writing_model import load_writing_model, what_writes
from todi.options import parse
from todi.runtime.allocator import settle_allocator
from todi.runtime.checksums import value_checksum
from todi.runtime.device import choose_device
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.runtime.heartbeat import start_heart
from todi.runtime.logs import set_up_logging
from todi.runtime.nodes import agree, check_ranks, nodes_from_environment, refusals_told, what_must_agree
from todi.runtime.whereabouts import at
from todi.settings import EvalConfig

logger = logging.getLogger("todi.evaluate")


def main() -> None:
    """Parse, check, build, run."""
    config = parse(EvalConfig, prog="python -m todi.evaluate")
    world = world_from_environment()
    start_heart(world)
    set_up_logging(world.is_main)
    device = choose_device(world.local_rank)
    settle_allocator(config.allocator, device)
    results = evaluate(config, world, device)
    if results and world.is_main:
        print(annotated_table({config.folder.name: results}))


def evaluate(config: EvalConfig, world: World, device: torch.device) -> dict[str, Any] | None:
    """Checks everything, then does what is left of every set.

    Returns:
        what results.json holds, on every rank; None where only the input was to be checked.

    Raises:
        RunError: see its kinds.
    """
    nodes = nodes_from_environment() if config.check_only else None
    with refusals_told(nodes):
        inputs = read_inputs(config, device)
    description = what_must_agree(vars(config), {name: questions_checksum(records)
                                                 for name, records in inputs.sets.items()}, world)
    if config.check_only:
        if nodes:
            agree(nodes, description)
        return None
    with process_group(world, device, config.process_group_timeout) if world.size > 1 else nullcontext():
        check_ranks(world, description)
        check_same_date(inputs.template_date, world)
        layout = layout_of(config, inputs, world)
        stores = open_stores(config, inputs, device, layout) if world.is_main else {}
        done = world.from_main({name: store.done(config.streams) for name, store in stores.items()})
        left = {name: [seed for seed in config.streams if seed not in done[name].seeds] for name in inputs.sets}
        if any(left.values()):
            write_sets(config, inputs, {name: seeds for name, seeds in left.items() if seeds}, done, stores, world,
                       device)
        else:
            logger.info("every set and seed is there already, made with the same settings")
        return world.from_main(report(config, inputs, stores) if world.is_main else None)


def layout_of(config: EvalConfig, inputs: EvalInputs, world: World) -> Layout:
    """In what batches the responses are written."""
    return Layout(rows_written_together(config.batch_size, inputs.model, config.decoding.max_length), world.size)


def open_stores(config: EvalConfig, inputs: EvalInputs, device: torch.device, layout: Layout) -> dict[str, SetStore]:
    """What there is of each set, with a word on what does not count."""
    made_with = what_writes(inputs.model, decoding_of(config), device, inputs.template_date, config.trust_remote_code)
    stores = {}
    for name, records in inputs.sets.items():
        of_set = {"data": questions_checksum(records), **named_tokenizer(inputs.rouge_tokenizers[name])}
        store = stores[name] = SetStore(config.folder, name, made_with | of_set, layout)
        if store.differences:
            logger.info("%s: what is there was made with other %s and is done again", name,
                        ", ".join(store.differences))
    return stores


def questions_checksum(records: Sequence[Record]) -> str:
    """Of all that a set asks and expects."""
    return value_checksum([[record.prompt, record.references] for record in records])


def write_sets(config: EvalConfig, inputs: EvalInputs, left: Mapping[str, Sequence[int]], done: Mapping[str, Done],
               stores: Mapping[str, SetStore], world: World, device: torch.device) -> None:
    """Writes and scores what is left, by set name and seeds."""
    decoding = decoding_of(config)
    model = load_writing_model(inputs.model, decoding, world, device, config.trust_remote_code)
    layout = layout_of(config, inputs, world)
    logger.info("responses are written in %s", layout)
    writer = Writer(model, inputs.model.tokenizer, decoding, layout.batch_size, world)
    total = sum(len(seeds) * len(inputs.sets[name]) for name, seeds in left.items())
    written = sum(seed in seeds for name, seeds in left.items() for seed, _ in done[name].rows)
    with progress_bar(total, written, world) as bar:
        for name, seeds in left.items():
            with at(f"the set {name}"):
                write_set(writer, inputs, name, seeds, done[name], stores.get(name), bar.update)


def write_set(writer: Writer, inputs: EvalInputs, name: str, seeds: Sequence[int], done: Done, store: SetStore | None,
              progress: Callable[[int], object]) -> None:
    """Writes and scores one set with `seeds`; `store` is that of the first rank."""
    started = time.perf_counter()
    records, examples = inputs.sets[name], inputs.examples[name]
    loss = mean_loss(writer, examples) if done.loss is None else done.loss
    responses = dict(done.rows)
    stops = stop_ids(writer.model, writer.tokenizer, records)
    for part in writer.rounds(name, [example.prompt for example in examples], seeds, done.rows, stops, progress):
        responses |= part
        if store:
            store.add(part)
    if store:
        by_seed = score(records, seeds, responses, writer.tokenizer, inputs.rouge_tokenizers[name])
        store.finish(by_seed, loss)
        summary = summarise(by_seed, loss)
        logger.info("%s: rouge-l %.2f, exact match %.1f %%, %.0f tokens a response, %.0f %% cut, loss %.3f (%.0f s)",
                    name, summary["rouge_l"], summary["exact_match"], summary["response_tokens"],
                    100 * summary["cut_share"], loss, time.perf_counter() - started)


def report(config: EvalConfig, inputs: EvalInputs, stores: Mapping[str, SetStore]) -> dict[str, Any]:
    """Writes results.json from the files of all sets; what it holds."""
    sets, scores = {}, []
    for name, store in stores.items():
        by_seed = store.generations(config.streams)
        sets[name] = summarise(by_seed, store.done(()).loss, inputs.rouge_tokenizers[name])
        scores.append(example_scores(by_seed))
    layouts = set().union(*(store.layouts(config.streams) for store in stores.values()))
    results = {
        "model": inputs.model.path, "adapter": config.peft_path,
        "settings": {**dataclasses.asdict(decoding_of(config)), "seeds": list(config.streams), "limit": config.limit,
                     "precision": inputs.model.precision.name, **noted_date(inputs.template_date)},
        "layouts": [layout._asdict() for layout in sorted(layouts)],
        "sets": sets, "average": average(sets, scores),
    }
    write_results(config.folder, results)
    logger.info("results are in %s", config.folder / "eval")
    return results


class _Callable(ModuleType):
    """todi.evaluate is this module, and is called as the library's function."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from todi.api import evaluate

        return evaluate(*args, **settings)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    run_main(main)
