"""A program, under torchrun: two ranks write with one student under ZeRO 1 and 3, and say what they wrote, and how.

    python tests/paces.py PLAN.json OUTPUT.json

The plan has `student`, a folder with a model and its tokenizer, and `lora`: whether an adapter is trained on it.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from todi.criterions import DistillationCriterion
from todi.data.batches import collate
from todi.data.records import Record
from todi.data.tokenize import Example
from todi.generation import decoding
from todi.generation.decoding import Decoding
from todi.generation.sampling import stream_key
from todi.generation.writer import Writer
from todi.models.adapters import add_lora
from todi.models.families import FAMILIES
from todi.models.loading import load_model, load_tokenizer
from todi.runtime.device import Precision
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.runtime.signals import Interrupted
from todi.training import dev, own_pace
from todi.training.deepspeed_config import build_deepspeed_config
from todi.training.optimizer import build_optimizer, build_schedule, wrap
from todi.training.own_pace import OwnPace
from todi.training.student import Student

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7), (9, 8), (3, 4, 5, 6, 7, 8, 9, 10, 11)]  # with limits that differ
WAYS = {"ZeRO 1": (1, 2**40), "whole": (3, 2**40), "in turns": (3, 0)}  # stage, bytes that are free


def build(student: str, stage: int, lora: bool) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    model = load_model(student, torch.float32, CPU)
    if lora:
        model = add_lora(model, FAMILIES["gpt2"], 4, 8, 0.1)
    model = Student(model)
    config = build_deepspeed_config(precision=Precision("fp32", "test"), zero_stage=stage, batch_size=2,
                                    accumulation=1, clip_grad=1.0)
    # tiny ones are cut too, and given back as soon as they have been used
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
                                    "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_grad=1.0,
                                stage=stage)
    engine = wrap(model, optimizer, build_schedule(optimizer, "constant", total_steps=9, warmup_steps=0, lr=1e-2,
                                                   lr_min=1e-2), config)
    model.share_head()
    return engine


def train(engine: deepspeed.DeepSpeedEngine, rank: int) -> float:
    """A step; its loss on this rank."""
    engine.eval()  # the losses are compared: no dropout
    batch = collate([Example((1, 2, 3, 4, 5 + rank), 2, 0), Example((7, 8, 9), 1, 1)], 0)
    sums, _ = engine(batch, DistillationCriterion())
    engine.backward(sums["loss"] / 6, scale_wrt_gas=False)
    engine.step()
    return sums["loss"].item()


@contextmanager
def fetches(said: dict[str, int]) -> Iterator[None]:
    """Counts how often a module asks for its weights within the block."""
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(*words: object, **more: object) -> None:
        said["fetches"] += 1
        fetch(*words, **more)

    with mock.patch.object(PartitionedParameterCoordinator, "fetch_sub_module", counted):
        yield


def judged(engine: deepspeed.DeepSpeedEngine, tokenizer: object, world: World) -> dict[str, object]:
    """Scores on dev, and what each rank wrote for them."""
    records = [Record("a", ("the number",))] * len(PROMPTS)
    examples = [Example((*prompt, 1, 2), len(prompt), number) for number, prompt in enumerate(PROMPTS)]
    written = []

    def noted(model: object, prompts: Sequence[Sequence[int]], *words: object, **settings: object) -> list:
        responses = decoding.generate(model, prompts, *words, **settings)
        written.extend([list(prompt), dataclasses.astuple(response)]
                       for prompt, response in zip(prompts, responses, strict=True))
        return responses

    judge = dev.DevSet(records, examples, PROMPTS, tokenizer, Decoding(24, 16), 2, 3, world, partial(collate, pad_id=0))
    with mock.patch.object(dev, "generate", noted):
        score = judge(engine)
    return {"loss": score.loss, "rouge": score.rouge_l, "written": world.gather(written)}


def stopped(engine: deepspeed.DeepSpeedEngine, tokenizer: object, world: World) -> list[int]:
    """The signal that each rank stops for when one of them is asked to after a few tokens."""
    judge = dev.DevSet([Record("a", ("the number",))] * len(PROMPTS), [Example((1, 2, 3), 1, 0)], PROMPTS, tokenizer,
                       Decoding(24, 16), 2, 3, world, partial(collate, pad_id=0))
    tokens = count()
    try:
        judge(engine, lambda: 15 if world.rank == 1 and next(tokens) == 3 else 0)
    except Interrupted as stop:
        return world.gather(stop.number)
    return world.gather(0)


def answered(model: torch.nn.Module, tokenizer: object, world: World, prompts: Sequence[Sequence[int]]) -> list:
    """Responses to prompts, in training mode as a round writes them; whether dropout's random numbers are untouched."""
    model.train()
    numbers = torch.get_rng_state()
    writer = Writer(model, tokenizer, Decoding(24, 16), 2, world, OwnPace(world))
    keys = [stream_key("test", number) for number in range(len(prompts))]
    responses = writer.write(prompts, keys, frozenset({0}))
    untouched = all(world.gather(torch.equal(numbers, torch.get_rng_state())))
    return [[dataclasses.astuple(response) for response in responses], model.training and untouched]


def one_way(student: str, stage: int, lora: bool, world: World) -> dict[str, object]:
    tokenizer, engine = load_tokenizer(student), build(student, stage, lora)
    said: dict[str, object] = {"fetches": 0}
    said["losses"] = [train(engine, world.rank) for _ in range(3)]
    said |= judged(engine, tokenizer, world)
    said["stopped"] = stopped(engine, tokenizer, world)
    with fetches(said):
        said["answers"] = [answered(engine.module.model, tokenizer, world, PROMPTS[:count]) for count in (3, 1)]
    said["losses"] += [train(engine, world.rank) for _ in range(2)]
    said["losses"] = world.gather(said["losses"])
    engine.destroy()
    return said


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world, found = world_from_environment(), {}
    with process_group(world, CPU, 60):
        for name, (stage, free) in WAYS.items():
            with mock.patch.object(own_pace, "available_bytes", mock.Mock(return_value=free)):
                found[name] = one_way(plan["student"], stage, plan["lora"], world)
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
