"""The files of a resume state: the rank that writes one sees that the disk holds it and says how long it is.

So none of many ranks looks at the files of all, and what a machine still has in its memory is not counted on.
"""

import copyreg
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from todi.errors import InputError
from todi.runtime.storage import make_durable

# All that DeepSpeed's files hold besides tensors and plain values; nothing else is unpickled.
_DEEPSPEED_TYPES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
# Python before 3.11.4 writes an enumeration as a call of getattr, which no file may ask for.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


class StateFiles(TorchCheckpointEngine):
    """What DeepSpeed writes its files with, and reads them; its own would unpickle whatever a file holds.

    Args:
        folder: in which, or below which, they lie.

    Attributes:
        sizes: bytes of each file that this rank has written, by its path in the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.zipfile_serialization = True  # as DeepSpeed's own writes; without it files cannot be mapped
        self.folder = folder
        self.sizes: dict[str, int] = {}

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Raises OSError, or RuntimeError as torch does, where it cannot be written."""
        super().save(state_dict, path)
        self.note(Path(path))

    def note(self, file: Path) -> None:
        """Has the disk hold a file that this rank has written by other means."""
        make_durable(file)
        self.sizes[str(file.relative_to(self.folder))] = file.stat().st_size

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Within `nothing_executed`."""
        return torch.load(path, map_location=map_location, weights_only=True)


@contextmanager
def nothing_executed(path: Path) -> Iterator[None]:
    """Within it files may hold what DeepSpeed writes; InputError for one that holds anything else."""
    try:
        with torch.serialization.safe_globals(_DEEPSPEED_TYPES):
            yield
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors and numbers, so it was not written by a run; nothing of it "
                         "was executed") from None
