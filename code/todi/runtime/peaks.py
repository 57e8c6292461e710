"""What a device can do at most: operations a second, known for GPUs and probed on a CPU; memory and links of GPUs."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_TERA = 1e12
_PROBED_SIZE = 1536  # of a square product: larger ones are no faster, and smaller ones are slower
_PROBED_SECONDS = 0.8

# Dense (no sparsity) tera-operations a second, of 16-bit products with fp32 sums, of TF32 and of fp32, as the data
# sheets of NVIDIA have them; 0 where there are none. The first name that fits counts.
_GPUS: dict[str, tuple[float, float, float]] = {
    r"GB200": (2500, 1250, 80),
    r"B200": (2250, 1125, 75),
    r"(H100|H200) NVL": (835, 417, 60),
    r"H100 PCIe": (756, 378, 51),
    r"GH200|H200|H100|H800": (989, 494, 67),
    r"H20\b": (148, 74, 44),
    r"A100|A800": (312, 156, 19.5),
    r"A40\b": (149.7, 74.8, 37.4),
    r"A30\b": (165, 82, 10.3),
    r"A10\b": (125, 62.5, 31.2),
    r"L40S": (362, 183, 91.6),
    r"L40\b": (181, 90.5, 90.5),
    r"L4\b": (121, 60, 30.3),
    r"RTX 6000 Ada": (364, 182, 91.1),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"V100S": (130, 0, 16.4),
    r"V100-PCIE": (112, 0, 14),
    r"V100": (125, 0, 15.7),
    r"T4\b": (65, 0, 8.1),
}
_WITHOUT_BF16 = r"V100|T4\b"

# GiB of memory, and GB a second that leave a GPU for others of its node (NVLink, half of what data sheets say of both
# directions; PCIe where there is none) and for the computer's memory (PCIe). The first name that fits counts.
_BOARDS: dict[str, tuple[float, float, float]] = {
    r"GB200": (186, 900, 225),
    r"B200": (180, 900, 64),
    r"H100 NVL": (94, 300, 64),
    r"H200 NVL": (141, 450, 64),
    r"H100 PCIe": (80, 300, 64),
    r"GH200": (96, 450, 450),
    r"H200": (141, 450, 64),
    r"H100": (80, 450, 64),
    r"H800": (80, 200, 64),
    r"H20\b": (96, 450, 64),
    r"A100.*40GB": (40, 300, 32),
    r"A100": (80, 300, 32),
    r"A800": (80, 200, 32),
    r"A40\b": (48, 32, 32),
    r"A30\b": (24, 32, 32),
    r"A10\b": (24, 32, 32),
    r"L40S|L40\b": (48, 32, 32),
    r"L4\b": (24, 32, 32),
    r"RTX 6000 Ada|RTX A6000": (48, 32, 32),
    r"V100.*16GB": (16, 150, 16),
    r"V100": (32, 150, 16),
    r"T4\b": (16, 16, 16),
}
GPU_NAMES = ("B200", "H200", "H100", "H100 PCIe", "A100", "A100 40GB", "L40S", "L4", "A10", "V100", "T4")  # some


@dataclass(frozen=True)
class Peak:
    """Floating-point operations a second, and how they are known."""

    flops: float
    source: str


@dataclass(frozen=True)
class Board:
    """A GPU as its data sheet has it, for arithmetic where there is none.

    Attributes:
        memory: bytes.
        link: bytes a second to the other GPUs of a node, one way.
        host: bytes a second to the computer's memory, one way.
    """

    name: str
    memory: int
    link: float
    host: float

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """Of matrix products, as `known_peak`, fp32 ones rounded to TF32."""
        return known_peak(self.name, dtype, tf32=True)


def known_board(name: str) -> Board | None:
    """The GPU that is called so; None of one that is not in the table."""
    found = _found(_BOARDS, name)
    return found and Board(name, int(found[0] * 2**30), found[1] * 1e9, found[2] * 1e9)


def peak_of(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> Peak | None:
    """Of matrix products in `dtype`; a CPU is probed, which takes about a second. None where it is not known.

    Args:
        tf32: whether fp32 products may be rounded to TF32.
    """
    if device.type == "cpu":
        return _probe(dtype)
    return known_peak(torch.cuda.get_device_name(device), dtype, tf32) if device.type == "cuda" else None


def known_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> Peak | None:
    """Of the GPU that CUDA calls `name`; None of one that is not in the table, is but a part (MIG), or has no such
    products."""
    found = _found(_GPUS, name)
    if found is None or "MIG" in name or (dtype == torch.bfloat16 and re.search(_WITHOUT_BF16, name)):
        return None
    half, tensor_fp32, plain_fp32 = found
    tera = half if dtype != torch.float32 else tensor_fp32 if tf32 and tensor_fp32 else plain_fp32
    return Peak(tera * _TERA, f"data sheet of {name}")


def _found(table: Mapping[str, tuple[float, float, float]], name: str) -> tuple[float, float, float] | None:
    return next((values for pattern, values in table.items() if re.search(rf"\b(?:{pattern})", name)), None)


def _probe(dtype: torch.dtype) -> Peak:
    """The fastest of the square products that are done in about a second."""
    left, right = (torch.ones(_PROBED_SIZE, _PROBED_SIZE, dtype=dtype) for _ in range(2))
    product = left @ right  # the first one sets things up
    fastest, end = float("inf"), time.perf_counter() + _PROBED_SECONDS
    while (start := time.perf_counter()) < end:
        torch.matmul(left, right, out=product)
        fastest = min(fastest, time.perf_counter() - start)
    return Peak(2 * _PROBED_SIZE**3 / fastest, f"fastest of the products of {torch.get_num_threads()} threads, probed")
