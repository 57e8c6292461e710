"""A program, under torchrun or by itself: trains a tiny model in each of several ways and counts what DeepSpeed sends
and holds, beside what the simulation says of that. Rank 0 prints a line of JSON for each way.

    torchrun --nproc-per-node 2 tests/spread.py FOLDER WAY ...     # a tiny model in FOLDER; ways as in WAYS
    FAKE=32 python tests/spread.py FOLDER WAY ...                  # rank 0 of 32 that are not there
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
MICRO_BATCHES = 3
# By name: ZeRO's stage, precision, LoRA or not, and keys of zero_optimization.
_SMALL = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 0}
WAYS = {
    "0": (0, "fp32", False, {}),
    "1": (1, "fp32", False, _SMALL),
    "1 bf16": (1, "bf16", False, _SMALL),
    "1 lora": (1, "fp32", True, _SMALL),
    "2": (2, "fp32", False, _SMALL),
    "3": (3, "fp32", False, _SMALL),
    "3 bf16": (3, "bf16", False, _SMALL),
    "3 lora": (3, "fp32", True, _SMALL),
    "3 again": (3, "fp32", False, _SMALL | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}),
    "3 small": (3, "fp32", False, _SMALL | {"stage3_param_persistence_threshold": 1000}),
}
# What of torch.distributed sends, and which of its arguments is the whole tensor.
_SENDS = {"all_reduce": ("all-reduce", 0), "all_gather_into_tensor": ("all-gather", 0),
          "reduce_scatter_tensor": ("reduce-scatter", 1), "reduce": ("reduce", 0), "broadcast": ("broadcast", 0)}

sent: Counter[str] = Counter()


def count_what_is_sent() -> None:
    """Before DeepSpeed takes the functions for its own."""
    for name, (kind, whole) in _SENDS.items():
        setattr(dist, name, counting(getattr(dist, name), kind, whole))


def counting(function, kind: str, whole: int):
    def counted(*tensors, **options):
        values = [*tensors, *options.values()]
        sent[kind] += values[whole].nbytes
        return function(*tensors, **options)
    return counted


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum({one.data_ptr(): one.nbytes for one in tensors if one is not None and one.numel()}.values())


def moments(optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]


def held(engine, stage: int) -> dict[str, int]:
    """Bytes of weights and of the optimizer on this rank."""
    parameters = list(engine.module.parameters())
    if stage == 0:
        return {"weights": bytes_of(parameters), "optimizer": bytes_of(moments(engine.optimizer))}
    optimizer = engine.optimizer
    masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    weights = [p.ds_tensor for p in parameters] if stage == 3 else parameters
    return {"weights": bytes_of(weights), "optimizer": bytes_of([*masters, *moments(optimizer.optimizer)])}


def gradients(engine, stage: int) -> int:
    """Bytes of what a micro-batch leaves for the next."""
    optimizer = engine.optimizer
    own = [p.grad for p in engine.module.parameters()]
    if stage == 3:
        return bytes_of([*own, optimizer.grad_partitions_flat_buffer])
    if stage == 2:
        own += [one for group in optimizer.all_grad_tensors.values() if group for one in group]
    return bytes_of(own)


def train(folder: str, name: str, world) -> dict[str, object]:
    """A way: what was counted in the second step, and what is said of it."""
    from todi.criterions import DistillationCriterion
    from todi.data.batches import collate
    from todi.data.tokenize import Example
    from todi.models.adapters import add_lora
    from todi.models.families import FAMILIES
    from todi.models.loading import empty_model, load_config, load_model
    from todi.runtime.device import Precision
    from todi.training.deepspeed_config import build_deepspeed_config
    from todi.training.memory import measure_shape, training_state
    from todi.training.optimizer import build_optimizer, build_schedule, wrap
    from todi.training.student import Student
    from todi.training.traffic import step_traffic

    stage, precision, lora, keys = WAYS[name]
    precision = Precision(precision, "asked for")
    models = [load_model(folder, precision.dtype, CPU), empty_model(load_config(folder), dtype=precision.dtype)]
    if lora:
        models = [add_lora(model, FAMILIES["tinyllama"], 8, 8, 0.0) for model in models]
    config = build_deepspeed_config(precision=precision, zero_stage=stage, batch_size=1, accumulation=MICRO_BATCHES,
                                    clip_grad=1.0, ranks=world.size)
    config["zero_optimization"] |= keys
    student = Student(models[0])
    optimizer = build_optimizer(student, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip_grad=1.0,
                                stage=stage)
    engine = wrap(student, optimizer, build_schedule(optimizer, "constant", total_steps=9, warmup_steps=0, lr=1e-3,
                                                     lr_min=0.0), config)
    student.share_head()
    batch, criterion = collate([Example(tuple(range(1, 9)), 2, 0)], 0), DistillationCriterion()
    between = 0
    for _ in range(2):  # in the first, ZeRO-3 finds out what comes after what
        sent.clear()
        for number in range(MICRO_BATCHES):
            engine.set_gradient_accumulation_boundary(number == MICRO_BATCHES - 1)
            sums, _ = engine(batch, criterion)
            engine.backward(sums["loss"], scale_wrt_gas=False)
            between = gradients(engine, stage) if number == 0 else between
            engine.step()
    counted = dict(sent) | held(engine, stage) | {"gradients": between}
    shape = measure_shape(models[1], 1, 8, CPU)
    said: Counter[str] = Counter()
    for one in step_traffic(shape, config["zero_optimization"], MICRO_BATCHES):
        said[one.kind] += one.payload
    state = training_state(shape, stage, world.size)
    said |= {name: getattr(state, name) for name in ("weights", "optimizer", "gradients")}
    files = save(engine, world, name)
    engine.destroy()
    return {"way": name, "ranks": world.size, "counted": counted, "said": dict(said), "files": files}


def save(engine, world, name: str) -> list[dict[str, int]]:
    """Bytes of what this rank and the others write of a state, and of the list that the first writes; that list."""
    from todi.training.state import Position, SavedState, StateStore

    if "FAKE" in os.environ:
        return []
    folder = Path(os.environ["STATES"]) / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    StateStore(folder, world).save(engine, SavedState(Position(step=2), {}, {}))
    state = next(folder.glob("state/epoch*"))
    files = {str(file.relative_to(state)): file.stat().st_size for file in state.rglob("*") if file.is_file()}
    return [files, json.loads((state / "state.json").read_text())["files"]]


def main() -> None:
    from todi.runtime.distributed import process_group, world_from_environment

    folder, *ways = sys.argv[1:]
    count_what_is_sent()
    if "FAKE" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        from torch.testing._internal.distributed.fake_pg import FakeStore
        dist.init_process_group("fake", rank=0, world_size=int(os.environ["FAKE"]), store=FakeStore())
    with process_group(world_from_environment(), CPU):
        world = world_from_environment()
        for name in ways:
            found = train(folder, name, world)
            if world.is_main:
                print("COUNTED", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
