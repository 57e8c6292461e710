"""Whether srun or mpirun started this process as one of several that know nothing of each other.

Each would train alone, all of them into one folder. torchrun gives its processes a RANK; who has one has fellows.
"""

from collections.abc import Mapping

from todi.errors import InputError

# Who starts processes, where it says how many, and which of them this one is. The shell of a SLURM job has numbers of
# its own, but is no step and has no SLURM_STEP_NUM_TASKS.
_STARTERS = (("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
             ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
             ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
             ("mpirun", "PMI_SIZE", "PMI_RANK"))


def check_sole_process(environment: Mapping[str, str]) -> None:
    """Raises InputError where this process is one of more than there are nodes (NNODES), and has no RANK."""
    if "RANK" in environment:
        return
    nodes = _number(environment.get("NNODES")) or 1
    for starter, size, rank in _STARTERS:
        number = _number(environment.get(rank))
        count = max(_number(environment.get(size)) or 1, (number or 0) + 1)
        if number is not None and count > nodes:
            raise InputError(f"this is process {number} of {count} that {starter} started ({rank}), and each would "
                             f"train alone: start one a node, by sbatch scripts/slurm/train.sbatch LAUNCHER or "
                             "scripts/hostfile.sh, or torchrun, which starts the others (NPROC)")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
