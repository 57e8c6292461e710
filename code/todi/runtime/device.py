"""Where to compute and in what precision, each with the reason, for the log."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from todi.errors import InputError

_DRIVER = Path("/proc/driver/nvidia/version")  # there when the kernel has one
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(name: str, own: torch.dtype) -> torch.dtype:
    """bf16, fp16 or fp32, or `own`."""
    return DTYPES.get(name, own)


def name_of(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Precision:
    """A compute precision: its name on the command line, its dtype, and why it was taken."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def choose_device(local_rank: int = 0) -> torch.device:
    """This process's GPU, or the CPU where there is none or none is wanted.

    Raises:
        InputError: there is a GPU that this PyTorch cannot use; says why, and what to do.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    asked_for_none = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    if _DRIVER.is_file() and not asked_for_none:
        raise InputError(f"this machine has an NVIDIA GPU that PyTorch {torch.__version__} cannot use: {_why_not()} "
                         "Install a PyTorch that fits the driver, or a newer driver; GPUS=cpu (of a launcher) or "
                         "CUDA_VISIBLE_DEVICES= computes on the CPU")
    return torch.device("cpu")


def _why_not() -> str:
    if torch.version.cuda is None:
        return "it was built without CUDA."
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "it finds none."


def choose_precision(name: str, device: torch.device, option: str = "--precision") -> Precision:
    """The precision called `name`, or under "auto" the fastest that is safe on `device`.

    Args:
        option: where the name came from, for the message.

    Raises:
        InputError: fp16 on a CPU, which neither DeepSpeed nor PyTorch trains in.
    """
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise InputError(f"{option} fp16 does not train on a CPU; use bf16, fp32 or auto")
        return Precision(name, "asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", f"{torch.cuda.get_device_name(device)} has bf16 arithmetic")
        return Precision("fp16", f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic")
    if cpu_has_bf16():
        return Precision("bf16", "this CPU has bf16 arithmetic")
    return Precision("fp32", "this CPU has no bf16 arithmetic")


def settle_tf32(wanted: bool, device: torch.device) -> None:
    """Whether fp32 products on a GPU may round their factors to TF32 (10 bits after the point); sums stay fp32."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = wanted


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX); elsewhere it is slower than fp32."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(info.read_text().split())
