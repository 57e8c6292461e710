"""How long a student writes under ZeRO-3, whose weights lie over the ranks, beside ZeRO-1.

    python benchmarks/zero3.py

It starts itself again under torchrun. A random GPT-2 answers random prompts, in one run four ways, one after the other:
under ZeRO-1; under ZeRO-3 with the weights gathered once; with the layers gathered in each forward, the ranks in turns;
and as before either, where every rank writes all of the responses in step. The median of each way counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

from todi.generation.decoding import Decoding, generate
from todi.generation.sampling import stream_key
from todi.runtime.device import choose_device, choose_precision
from todi.runtime.distributed import World, process_group, world_from_environment
from todi.training.deepspeed_config import build_deepspeed_config
from todi.training.optimizer import build_optimizer, build_schedule, wrap
from todi.training.own_pace import OwnPace
from todi.training.student import Student

NO_ROOM = 1 << 62  # bytes that no device has, so that nothing is gathered for long


def build(options: argparse.Namespace, stage: int, device: torch.device) -> deepspeed.DeepSpeedEngine:
    """An engine around a random model, the same for every stage."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=options.vocabulary, n_embd=options.hidden, n_layer=options.layers,
                                  n_head=8, bos_token_id=0, eos_token_id=0)
    student = Student(AutoModelForCausalLM.from_config(config).to(device))
    settings = build_deepspeed_config(precision=choose_precision("fp32", device), zero_stage=stage, batch_size=1,
                                      accumulation=1, clip_grad=1.0)
    optimizer = build_optimizer(student, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_grad=1.0,
                                stage=stage)
    return wrap(student, optimizer, build_schedule(optimizer, "constant", total_steps=9, warmup_steps=0, lr=1e-4,
                                                   lr_min=1e-4), settings)


def seconds(write: Callable[[], object], world: World) -> float:
    """From the first rank's start to the last one's end."""
    world.barrier()
    started = time.perf_counter()
    write()
    world.barrier()
    return time.perf_counter() - started


def measure(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in every turn."""
    numbers = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, options.vocabulary, (8 + place % 9,), generator=numbers).tolist()
               for place in range(options.prompts)]
    model = {stage: build(options, stage, device).module.model for stage in (1, 3)}

    def writing(stage: int, pace: Callable, mine: slice) -> Callable[[], object]:
        def write() -> None:
            keys = [stream_key("benchmark", place) for place in range(len(prompts))]
            with pace(model[stage]):
                generate(model[stage], prompts[mine], keys[mine], decoding=Decoding(256, options.tokens), eos_ids={0},
                         pad_id=0, batch_size=options.batch_size)
        return write

    share = slice(world.rank, None, world.size)
    ways = {"ZeRO-1": writing(1, nullcontext, share), "ZeRO-3, gathered once": writing(3, OwnPace(world), share),
            "ZeRO-3, layer by layer": writing(3, OwnPace(world, NO_ROOM), share),
            "ZeRO-3, every rank writes all": writing(3, nullcontext, slice(None))}
    return {name: [seconds(write, world) for _ in range(options.turns)] for name, write in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of a response at most")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts that a rank answers together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        sys.exit(subprocess.run([sys.executable, *torchrun, *sys.argv]).returncode)
    world = world_from_environment()
    device = choose_device(world.local_rank)
    with process_group(world, device):
        found = measure(options, world, device)
    if world.is_main:
        base = statistics.median(found["ZeRO-1"])
        print("| way | seconds | of ZeRO-1's |\n| --- | --- | --- |")
        for name, values in found.items():
            print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(values) / base:.2f} × |")


if __name__ == "__main__":
    main()
