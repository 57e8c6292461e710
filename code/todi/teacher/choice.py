"""Whether a teacher cache pays: what it would take and save, and what that decides under `auto`."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

FREE_DISK_SHARE = 0.5  # of the free disk may be filled without being asked
LEAST_SAVING = 60.0  # seconds; below that a cache is not worth its files
# Of the speed of a plain matrix product, what a forward pass reaches, counting the backbone's matrices alone.
_EFFICIENCY = {"cpu": 0.45, "cuda": 0.4}


@dataclass(frozen=True)
class Estimate:
    """What a cache would take and save.

    Attributes:
        bytes: of its hidden states.
        free_bytes: of the disk that it would lie on.
        seconds: of one pass of the teacher over the samples.
        passes: over the samples that training makes.
    """

    bytes: int
    free_bytes: int
    seconds: float
    passes: float

    @property
    def saving(self) -> float:
        """Seconds, less those of the pass that fills the cache."""
        return (self.passes - 1) * self.seconds

    def reason_against(self) -> str | None:
        """Why the teacher had better run live; None when a cache pays."""
        if self.passes <= 1:
            return "each sample is seen once"
        if self.saving < LEAST_SAVING:
            return "it would save less than a minute"
        if self.bytes > FREE_DISK_SHARE * self.free_bytes:
            return f"it would fill more than {FREE_DISK_SHARE:.0%} of the free disk"
        return None

    def __str__(self) -> str:
        return (f"{self.bytes / 1e9:.3g} GB of {self.free_bytes / 1e9:.0f} GB free, about {self.seconds / 60:.1f} min "
                f"to fill, saves about {max(0.0, self.saving) / 60:.1f} min in {self.passes:.3g} passes")


def estimate(*, folder: Path, bytes: int, tokens: int, parameters: int, passes: float, device: torch.device,
             dtype: torch.dtype, ranks: int) -> Estimate:
    """Args:
        tokens: of all samples, prompts included.
        parameters: in the matrices of the teacher's backbone: two operations for each and token.
        ranks: that share the pass.
    """
    speed = _matmul_speed(device, dtype) * _EFFICIENCY[device.type]
    return Estimate(bytes, free_bytes(folder), 2 * parameters * tokens / speed / ranks, passes)


def free_bytes(folder: Path) -> int:
    """Of the disk that `folder`, which need not be there, would lie on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of the size of a layer's."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(4):  # the first one starts threads and loads kernels
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
