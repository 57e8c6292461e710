"""The tables of a simulation, in Markdown."""

from todi.evaluation.results import aligned
from todi.simulation import Simulation, Variant

_GIB, _GB = 2**30, 1e9
# Parts of the memory by their columns.
_PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "teacher": "teacher",
          "working": "activations and loss", "buffers": "DeepSpeed's buffers", "nccl": "NCCL", "base": "CUDA",
          "holes": "holes"}


def report(simulation: Simulation) -> str:
    """Everything that a simulation says."""
    parts = ["\n".join(facts(simulation)),
             "Memory of a GPU when it is fullest, in GiB", memory_table(simulation),
             "What a GPU sends in a step, in GB", traffic_table(simulation),
             "Hours", hours_table(simulation), arithmetic(simulation)]
    if simulation.teachers:
        parts.append(cache_facts(simulation))
    return "\n\n".join([*parts, "What the first rank does alone", duties_table(simulation)])


def facts(simulation: Simulation) -> list[str]:
    """What was given and what was assumed, a sentence each."""
    board, cluster, links, shape = simulation.board, simulation.cluster, simulation.links, simulation.shape
    student, speed = simulation.student, f"{simulation.pace.peak / 1e12:.0f} TFLOP/s"
    models = [f"student {student.path}: {shape.parameters / 1e9:.2f} billion parameters, {shape.trained / 1e9:.2f} "
              f"billion trained, {student.precision.name} ({student.precision.reason})"]
    models += [f"teacher {one.path}: {size / _GIB:.1f} GiB of weights in {one.precision.name}"
               for one, size in zip(simulation.teachers, simulation.teacher_bytes, strict=True)]
    if simulation.config.teacher.teacher_callable:
        models.append("teacher: a function, whose memory and time are not known here")
    if simulation.config.source.on_policy:
        models.append("what the student writes itself takes time besides, which is not counted")
    return [
        f"nothing was run: {links.nodes} x {links.gpus} = {links.ranks} {board.name}, by data sheet "
        f"{board.memory / _GIB:.0f} GiB, {speed} in {student.precision.name}, {links.link / _GB:.0f} GB/s to another "
        f"GPU of the machine, {board.host / _GB:.0f} GB/s to its memory",
        f"assumed: an MFU of {cluster.assumed_mfu:.0%} (--assumed-mfu), {cluster.network:g} GB/s from a machine to the "
        f"others (--network), {cluster.disk:g} GB/s of a process to a disk (--disk)",
        *models,
        f"data: {simulation.text.source}",
        f"a step: {simulation.step_samples} samples over all GPUs, micro-batches of at most "
        f"{simulation.positions[0]} x {simulation.positions[1]} tokens, of which each has {simulation.micro_batches}; "
        f"{simulation.steps:,} steps ({simulation.config.optim.num_epochs} epochs)"]


def memory_table(simulation: Simulation) -> str:
    """A line for each variant: what each part of a GPU's memory has, and whether all of it is there."""
    rows = [["ZeRO stage, offloaded", "teacher", *_PARTS.values(), "in all", "fits", "computer's memory"]]
    for one in simulation.variants:
        memory = simulation.memory(one)
        rows.append([str(one), _teacher(simulation, one), *(_gib(getattr(memory, name)) for name in _PARTS),
                     _gib(memory.total), "yes" if memory.total <= simulation.board.memory else "no",
                     _gib(memory.offloaded * simulation.links.gpus)])
    return aligned(rows)


def traffic_table(simulation: Simulation) -> str:
    """A line for each kind of operation of each stage, in the order of a step."""
    links = simulation.links
    rows = [["ZeRO stage, offloaded", "operation", "of", "tensors", "sent", "within the machine", "to others",
             "seconds", "beside the computing"]]
    live = [one for one in simulation.variants if not one.cached]  # from a cache nothing is sent
    stages = {one.stage: one for one in reversed(live)}  # offloading changes nothing but the copies
    for one in sorted(stages.values(), key=lambda one: one.stage):
        for part in simulation.traffic(one):
            sent = part.sent(links.ranks)
            rows.append([str(one.stage), part.kind, part.what, _gb(part.payload), _gb(sent),
                         *map(_gb, links.shares(sent)), f"{links.seconds(sent):.3f}",
                         "yes" if part.overlapped else "no"])
    rows += [[str(one), "copies", "to and from the computer's memory", "", _gb(host), "", "",
              f"{host / simulation.board.host:.3f}", "no"] for one in live if (host := simulation.to_host(one))]
    return aligned(rows)


def hours_table(simulation: Simulation) -> str:
    """A line for each variant."""
    rows = [["ZeRO stage, offloaded", "teacher", "operations of a step", "seconds of computing", "seconds of sending",
             "hours"]]
    for one in simulation.variants:
        found = simulation.forecast(one)
        rows.append([str(one), _teacher(simulation, one), f"{found.operations:.3g}", f"{found.computing:.3f}",
                     f"{found.exposed:.3f}", f"{found.hours:.3g}"])
    return aligned(rows)


def arithmetic(simulation: Simulation) -> str:
    """The hours of the first line, worked out."""
    one = simulation.variants[0]
    found, pace = simulation.forecast(one), simulation.pace
    seconds = found.computing + found.exposed
    return (f"The first line: {found.steps:,} steps x ({found.operations:.4g} operations / ({pace.links.ranks} GPUs x "
            f"{pace.peak:.3g} x {pace.mfu:g}) + {found.exposed:.3f} s) = {found.steps:,} x "
            f"{seconds:.3f} s = {found.hours:.3g} h, without evaluation, checkpoints and the start. Sending that is "
            "done beside the computing counts as far as it takes longer.")


def cache_facts(simulation: Simulation) -> str:
    """What a cache takes."""
    whole = max(simulation.teacher_bytes)
    place = ("which fits" if whole < simulation.board.memory else
             "which does not fit: it has to be filled elsewhere and copied, or by a teacher that at least "
             f"{-(-whole // simulation.board.memory)} GPUs share")
    return (f"A cache is filled in {simulation.filling():.3g} h on these GPUs, once, and has "
            f"{simulation.cache_size() / _GB:.1f} GB; each GPU holds {whole / _GIB:.1f} GiB of a teacher's weights "
            f"meanwhile, {place}.")


def duties_table(simulation: Simulation) -> str:
    """Of the variant that the settings name, what the first rank does alone."""
    rows = [["when", "what", "MB", "seconds", "more with more ranks"]]
    wanted = simulation.config.run.zero_stage
    one = next((one for one in simulation.variants if one.stage >= wanted and not one.offload),
               simulation.variants[0])
    rows += [[duty.when, duty.what, f"{duty.bytes / 1e6:,.3f}", f"{duty.seconds:.1f}", "yes" if duty.grows else "no"]
             for duty in simulation.duties(one)]
    return aligned(rows)


def _teacher(simulation: Simulation, variant: Variant) -> str:
    if not simulation.teachers or variant.cached:
        return "cached" if simulation.teachers else "none"
    return "live, spread" if simulation.teacher_ranks(variant) > 1 else "live"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


def _gb(size: int) -> str:
    return f"{size / _GB:.2f}"
