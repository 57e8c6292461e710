"""C's allocator on a CPU: whether the memory that a step frees stays with the process."""

import ctypes
import os
import re

import torch

# Parameters of mallopt(3), by glibc's malloc.h.
_LARGEST_FAST, _TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = 1, -1, -2, -4
_NEVER = -1
_GROWTH = 256 << 20  # bytes by which the heap grows at least; they are touched, and so take memory, when they are used


_settled = "as the program that this is called from has it"


def who_allocates() -> str:
    """What `settle_allocator` said last, if it was called, for a log that begins later."""
    return _settled


def settle_allocator(name: str, device: torch.device) -> str:
    """Lets this process keep what it frees, if it is asked to; to be called before there are tensors.

    glibc maps each block of more than 32 MiB anew and unmaps it when it is freed, and gives back what is free at the
    heap's end, so that the kernel fills every large temporary with zeros, page by page, at every operation. Kept in the
    heap, the same pages serve the next one. No result changes.

    But samples have many lengths, the pieces between what is in use seldom fit the next tensor, and the heap grows over
    hundreds of steps, to twice the memory. So nothing is done by itself: launchers load an allocator that wastes less.

    Args:
        name: glibc; or auto or system, which change nothing.
        device: where the tensors are.

    Returns:
        who allocates and why, for the log.
    """
    global _settled
    _settled = _settle(name, device)
    return _settled


def _settle(name: str, device: torch.device) -> str:
    if name == "system":
        return "as the system has it (asked for)"
    if device.type != "cpu":
        return "as the system has it (the tensors are not in its memory)"
    chosen = _chosen_by_the_user()
    if chosen:
        return f"as {chosen} has it"
    if name != "glibc":
        return "as the system has it (ALLOCATOR=glibc is faster, and takes more memory)"
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return "as the system has it (this is not glibc, whose heap could be set)"
    # Large blocks are aligned, and what that leaves beside them must join them again when they are freed, or the next
    # one of the same size does not fit: so small blocks are not kept apart for a fast reuse.
    mallopt(_LARGEST_FAST, 0)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    mallopt(_TOP_PAD, _GROWTH)
    return "glibc, keeping what is freed (each step takes the same memory again)"


def _chosen_by_the_user() -> str | None:
    """The library that was loaded in glibc's place, or the variable that sets glibc's heap, if there is one."""
    other = re.search(r"[^\s:]*malloc[^\s:]*", os.environ.get("LD_PRELOAD", ""))
    if other:
        return other[0]
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES"
    return next((name for name in os.environ if name.startswith("MALLOC_") and name.endswith("_")), None)
