"""Prints the variables that a launcher on another host must have too, quoted for a shell: settings, and of libraries.

    LR=1e-3 NCCL_DEBUG=INFO python -m todi.elsewhere
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping

from todi.errors import run_main
from todi.launch import our_variables, set_variables

_ALSO = {"PYTHON", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"}
_OF_LIBRARIES = ("NCCL_", "GLOO_", "TORCH_", "HF_", "DS_", "WANDB_", "TRITON_")  # what their variables begin with
_OF_THIS_HOST = {"SSH", "NNODES", "NODE_RANK"}


def main() -> None:
    """Print."""
    sys.stdout.buffer.write(os.fsencode(f"{shlex.join(handed_on(os.environ))}\n"))


def handed_on(environment: Mapping[str, str]) -> Iterator[str]:
    """NAME=VALUE of each. Raises InputError for variables that are nearly settings."""
    wanted = (our_variables() | _ALSO) - _OF_THIS_HOST
    for name, value in set_variables(environment).items():
        if name in wanted or name.startswith(_OF_LIBRARIES):
            yield f"{name}={value}"


if __name__ == "__main__":
    run_main(main)
