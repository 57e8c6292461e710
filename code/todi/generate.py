"""Has a model answer the prompts of a data set once, and writes a data set that training reads.

    python -m todi.generate --model-path TEACHER --data-dir data/dolly --save-dir data/dolly-by-teacher --seeds 10
    DATA_DIR=data/dolly-by-teacher bash scripts/gpt2/sft_gpt2_base.sh

An interrupted run goes on where it was and ends with the same bytes; what is finished is left alone.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from todi.data.template_date import check_same_date
from todi.errors import InputError, run_main
from todi.generation.decoding import Decoding, Response, stop_ids
from todi.generation.text_files import Selection, TextFolder, describe
from todi.generation.text_inputs import TextInputs, read_inputs
from todi.generation.together import rows_written_together
from todi.generation.writer import Layout, Row, Writer, progress_bar
from todi.generation.writing_model import build_decoding, load_writing_model, what_writes
from todi.options import parse
from todi.runtime.allocator import settle_allocator
from todi.runtime.checksums import bytes_checksum, value_checksum
from todi.runtime.device import choose_device
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.runtime.heartbeat import start_heart
from todi.runtime.locks import check_unclaimed, claimed
from todi.runtime.logs import set_up_logging
from todi.runtime.nodes import agree, check_ranks, nodes_from_environment, refusals_told, what_must_agree
from todi.settings import GenerateConfig

logger = logging.getLogger("todi.generate")


def main() -> None:
    """Parse, check, build, run."""
    config = parse(GenerateConfig, prog="python -m todi.generate")
    world = world_from_environment()
    start_heart(world)
    set_up_logging(world.is_main)
    device = choose_device(world.local_rank)
    settle_allocator(config.allocator, device)
    generate(config, world, device)


def generate(config: GenerateConfig, world: World, device: torch.device) -> None:
    """Checks everything, then writes what is left of the set.

    Raises:
        RunError: see its kinds.
    """
    folder, nodes = Path(config.save_dir), nodes_from_environment() if config.check_only else None
    with refusals_told(nodes):
        inputs = read_inputs(config, device)
        if config.check_only:
            # other weights are found by the run, which reads them anyway
            check_folder(open_folder(config, inputs, device, world, of_weights=False).refusal())
            check_unclaimed(folder)
    description = what_must_agree(vars(config), data_checksums(inputs), world)
    if config.check_only:
        if nodes:
            agree(nodes, description)
        return
    with process_group(world, device, config.process_group_timeout) if world.size > 1 else nullcontext():
        check_ranks(world, description)
        check_same_date(inputs.template_date, world)
        with claimed(folder) if world.is_main else nullcontext():
            text = open_folder(config, inputs, device, world) if world.is_main else None
            check_folder(world.from_main(text and text.refusal()))
            if text:
                text.begin()
            finished, written = world.from_main((text.finished, text.rows) if text else None)
            if finished:
                logger.info("%s is there already, made with the same settings", folder)
                return
            responses = write_rest(config, inputs, written, text, world, device)
            if text:
                summary = text.finish(inputs.records, config.streams, responses, inputs.model.tokenizer)
                logger.info("%s: %d responses of %s, %.0f tokens on average", folder, summary["kept"],
                            describe(summary), summary["mean_tokens"])
        world.barrier()  # until the files are there


def open_folder(config: GenerateConfig, inputs: TextInputs, device: torch.device, world: World,
                of_weights: bool = True) -> TextFolder:
    """What there is of the set already. Args: of_weights: whether the checksums of the model are taken."""
    made_with = {**what_writes(inputs.model, decoding_of(config), device, inputs.template_date,
                               config.trust_remote_code, of_weights),
                 "seeds": list(config.streams), **data_checksums(inputs)}
    selection = Selection(config.drop_cut, config.least_tokens, config.most_tokens)
    return TextFolder(Path(config.save_dir), made_with, selection, inputs.dev, layout_of(config, inputs, world))


def layout_of(config: GenerateConfig, inputs: TextInputs, world: World) -> Layout:
    """In what batches the responses are written."""
    return Layout(rows_written_together(config.batch_size, inputs.model, config.decoding.max_length), world.size)


def check_folder(refusal: str | None) -> None:
    """Raises InputError with the sentence, where there is one."""
    if refusal:
        raise InputError(refusal)


def data_checksums(inputs: TextInputs) -> dict[str, str]:
    """Of all that is asked, and of dev.jsonl."""
    return {"prompts": value_checksum([record.prompt for record in inputs.records]),
            "dev.jsonl": bytes_checksum(inputs.dev)}


def decoding_of(config: GenerateConfig) -> Decoding:
    """How the responses are written: to their end, or to the greatest length of a training sample."""
    return build_decoding(config.decoding, config.decoding.max_length, config.no_repeat_ngram_size)


def write_rest(config: GenerateConfig, inputs: TextInputs, written: Mapping[Row, Response], text: TextFolder | None,
               world: World, device: torch.device) -> dict[Row, Response]:
    """Writes the responses that are not `written`; all of them.

    Args:
        text: keeps them, on the first rank.
    """
    responses, total = dict(written), len(config.streams) * len(inputs.prompts)
    if len(responses) == total:  # it was killed when it had written all
        return responses
    decoding = decoding_of(config)
    model = load_writing_model(inputs.model, decoding, world, device, config.trust_remote_code)
    layout = layout_of(config, inputs, world)
    logger.info("responses are written in %s", layout)
    writer = Writer(model, inputs.model.tokenizer, decoding, layout.batch_size, world)
    stops = stop_ids(model, inputs.model.tokenizer, inputs.records)
    with progress_bar(total, len(written), world) as bar:
        for part in writer.rounds("teacher text", inputs.prompts, config.streams, written, stops, bar.update):
            responses |= part
            if text:
                text.add(part)
    return responses


if __name__ == "__main__":
    run_main(main)
