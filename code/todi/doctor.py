"""Looks at a training run before it starts: what is wrong, what it will need, and how to mend it.

    python -m todi.doctor --model-path STUDENT --teacher-model-path TEACHER ...     # the options of todi.train
    DOCTOR=1 bash scripts/gpt2/vanilla_kd_gpt2_base.sh                              # a launcher's
    python -m todi.doctor --nodes 4 --gpus 8 ...          # the same run on other machines, by arithmetic

WORLD_SIZE says for how many devices. Exit code 2 when something is wrong. Every training run begins with this report.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from todi.data.tokenize import Example, encode_examples
from todi.errors import run_main
from todi.options import parse
from todi.runtime.device import choose_device
from todi.runtime.distributed import World, world_from_environment
from todi.runtime.logs import set_up_logging
from todi.settings import DoctorConfig, TrainConfig
from todi.simulation_inputs import read_simulation
from todi.simulation_tables import report
from todi.training.estimate import estimate_memory, samples_of, student_shape, teacher_bytes
from todi.training.memory import Memory, Shape, available_bytes
from todi.training.record import with_steps_as_before
from todi.training.state import KEPT_STATES
from todi.training.train_inputs import TrainInputs, longest_sample, read_inputs

logger = logging.getLogger("todi.doctor")

_GIB = 2**30


@dataclass(frozen=True)
class Report:
    """What a run will need, and what is likely to go wrong with it, a sentence each.

    Attributes:
        teacher_spread: whether the teachers' weights are to lie over the ranks.
    """

    facts: list[str]
    warnings: list[str]
    teacher_spread: bool = False

    def log(self) -> None:
        for fact in self.facts:
            logger.info("%s", fact)
        for warning in self.warnings:
            logger.warning("warning: %s", warning)


def main() -> None:
    """Parse, check, report."""
    settings = parse(DoctorConfig, prog="python -m todi.doctor")
    world = world_from_environment()
    set_up_logging(world.is_main)
    if settings.cluster.wanted:
        print(report(read_simulation(settings)))
        return
    device = choose_device(world.local_rank)
    config = with_steps_as_before(settings.train, world.size)
    inputs = read_inputs(config, device)
    data, student = config.data, inputs.student
    examples = encode_examples(inputs.train, student.tokenizer, student.family, data.max_length,
                               data.max_prompt_length)
    cached = config.cache.teacher_cache not in ("auto", "off") and not config.source.on_policy
    found = examine(config, inputs, examples, world, device, [cached] * len(inputs.teachers))
    found.log()
    if not found.warnings:
        logger.info("nothing is wrong")


def examine(config: TrainConfig, inputs: TrainInputs, examples: Sequence[Example], world: World,
            device: torch.device, cached: Sequence[bool] = ()) -> Report:
    """Estimates memory and disk space of a run whose input is in order; loads no weights.

    Args:
        cached: of each teacher, whether its hidden states come from a cache; without it, none does.
    """
    length = longest_sample(config, examples)[0] - 1
    student = student_shape(config, inputs, length, device)
    estimates = {ranks: estimate_memory(config, inputs, student, examples, world, device, cached, ranks)
                 for ranks in {1, world.size}}
    available = available_bytes(device, world.local_size)
    spread, reasons = _about_spreading(config, inputs, estimates, available, world.size)
    memory = estimates[world.size if spread else 1]
    facts, warnings = _about_memory(memory, config, inputs.deepspeed_config["zero_optimization"]["stage"],
                                    available + memory.base, length)
    others = (_about_offload(memory, available_bytes(torch.device("cpu"), world.local_size)),
              _about_disk(config, student))
    return Report([*reasons, *facts, *(fact for more, _ in others for fact in more)],
                  warnings + [warning for _, more in others for warning in more], spread)


def _about_memory(memory: Memory, config: TrainConfig, stage: int, available: int,
                  length: int) -> tuple[list[str], list[str]]:
    parts = ", ".join(f"{name.replace('_', ' ')} {size / _GIB:.2f}" for name, size in vars(memory).items()
                      if size and name != "offloaded")
    facts = [f"memory: about {memory.total / _GIB:.2f} GiB on each device when fullest ({parts}) at "
             f"{samples_of(config.optim, length)} x {length} tokens; {available / _GIB:.2f} GiB are free"]
    if memory.total <= available:
        return facts, []
    fitting = int(config.optim.tokens(length) * (1 - (memory.total - available) / max(memory.working, 1)))
    remedies = [f"--max-tokens {fitting}" if fitting >= length and config.optim.packing != "off" else
                f"a smaller --batch-size than {config.optim.batch_size} with more --gradient-accumulation-steps"
                if config.optim.batch_size > 1 else "a smaller --max-length"]
    if not config.student.gradient_checkpointing:
        remedies.append("--gradient-checkpointing")
    if not config.student.peft:
        remedies.append("--peft lora")
    if stage < 3:
        remedies.append("more devices with --zero-stage 3")
    return facts, [f"the run needs about {memory.total / _GIB:.2f} GiB on a device that has {available / _GIB:.2f} "
                   f"free; use {', or '.join(remedies)}"]


def _about_spreading(config: TrainConfig, inputs: TrainInputs, estimates: Mapping[int, Memory], available: int,
                     ranks: int) -> tuple[bool, list[str]]:
    """Whether the teachers' weights are to lie over the ranks, and why.

    Args:
        estimates: by the number of ranks that they lie over.
        available: bytes that are free on a device.
    """
    wanted = config.teacher.teacher_zero
    if wanted != "auto" or not inputs.teachers or ranks == 1:
        return wanted == "on", []
    trust = config.student.trust_remote_code
    # a pass that fills a cache has the teacher alone on the device
    alone = {over: max(teacher_bytes(model, 0, False, trust, over) for model in inputs.teachers) for over in estimates}
    whole, spread = (max(estimates[over].total - estimates[over].base, alone[over]) for over in (1, ranks))
    if whole <= available or spread >= whole:
        return False, []
    return True, [f"teacher: spread over {ranks} ranks: a device needs {whole / _GIB:.2f} GiB with a whole one, "
                  f"{spread / _GIB:.2f} with its share, and {available / _GIB:.2f} are free"]


def _about_offload(memory: Memory, available: int) -> tuple[list[str], list[str]]:
    if not memory.offloaded:
        return [], []
    facts = [f"offloaded: about {memory.offloaded / _GIB:.2f} GiB of the computer's memory for each device; "
             f"{available / _GIB:.2f} GiB are free for it"]
    if memory.offloaded <= available:
        return facts, []
    return facts, [f"offloading needs about {memory.offloaded / _GIB:.2f} GiB of the computer's memory for each "
                   f"device, and {available / _GIB:.2f} are free; use fewer devices a node, or --peft lora"]


def _about_disk(config: TrainConfig, student: Shape) -> tuple[list[str], list[str]]:
    """Each checkpoint and each resume state is written before an older one goes."""
    folder = Path(config.run.save_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    checkpoint = (student.trained if config.student.peft else student.parameters) * student.width
    state = student.trained * (student.width + 12)  # weights, and the optimizer's fp32 masters and moments
    kept = config.run.keep_best_n_checkpoints
    needed = (kept + 1) * checkpoint + (KEPT_STATES + 1) * state
    facts = [f"disk: up to {needed / _GIB:.2f} GiB in {config.run.save_dir} ({kept} + 1 checkpoints of "
             f"{checkpoint / _GIB:.2f}, {KEPT_STATES} + 1 states of {state / _GIB:.2f}); {free / _GIB:.2f} GiB are "
             "free"]
    if needed <= free:
        return facts, []
    return facts, [f"{folder} has {free / _GIB:.2f} GiB free, the run needs up to {needed / _GIB:.2f}; make room, "
                   f"choose another --save-dir, or keep fewer than {kept} checkpoints"]


if __name__ == "__main__":
    run_main(main)
