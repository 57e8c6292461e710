"""The fused kernel, compiled ahead of time for GPUs that need not be there: registers, spills, widths of its loads.

    PYTHONPATH=code:tests python tests/compiled.py     # prints the table of docs/performance.md

It is a process of its own: where TRITON_INTERPRET is set, nothing can be compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import triton
from todi.criterions.triton_points import POINTS
from todi.criterions.triton_rows import BLOCK, WARPS, rows_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

GPUS = {80: "A100", 90: "H100", 100: "B200", 120: "RTX 50"}
POINTERS = {"labels_ptr": "*i64", "sums_ptr": "*fp32"}
INTEGERS = ("logits_stride", "teacher_stride", "vocabulary", "readable")
ZERO_BITS = {"bf16": 16, "fp16": 13, "fp32": 0}


@dataclass(frozen=True)
class Variant:
    """A kernel that can be launched.

    Attributes:
        name: of the divergence, None for cross-entropy alone.
        odd: whether the vocabulary is no multiple of 16.
        aligned: whether rows start at multiples of 16 numbers.
    """

    name: str | None
    dtype: str = "bf16"
    odd: bool = False
    aligned: bool = True

    @property
    def words(self) -> str:
        """Of its logits."""
        return self.dtype + self.odd * ", odd vocabulary" + (not self.aligned) * ", not aligned"


VARIANTS = [Variant(None), *map(Variant, POINTS), Variant("ToDi", "fp16"), Variant("ToDi", "fp32"),
            Variant("ToDi", odd=True), Variant("ToDi", odd=True, aligned=False)]


def compiled(variant: Variant, gpu: int) -> tuple[int, int, int]:
    """Registers of a thread, bytes that it spills, bits of its widest load of logits.

    Args:
        gpu: compute capability, e.g. 90.
    """
    names = rows_kernel.arg_names
    point = POINTS.get(variant.name)
    constants = {"POINT": point and point.function, "SELECTS": bool(point and point.selects),
                 "ZERO_BITS": ZERO_BITS[variant.dtype], "SOFTCAPS": False, "WRITES": True, "BLOCK": BLOCK}
    logits = f"*{variant.dtype}"
    kinds = POINTERS | dict.fromkeys(("logits_ptr", "teacher_ptr"), logits) | dict.fromkeys(INTEGERS, "i32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in names}
    odd = {"vocabulary"} if variant.odd else set()
    divisible = [name for name, kind in signature.items()
                 if kind[0] == "*" or (name in INTEGERS and variant.aligned and name not in odd)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    kernel = triton.compile(ASTSource(rows_kernel, signature, constants, attributes),
                            target=GPUTarget("cuda", gpu, 32), options={"num_warps": WARPS})
    ptx = kernel.asm["ptx"]
    loads = re.findall(r"ld\.global[\w.:]*?\.(?:v(\d)\.)?b(\d+)", ptx)
    widths = {int(vector or 1) * int(bits) for vector, bits in loads} - {64}  # which is the label
    return *_assembled(ptx, gpu), max(widths)


def _assembled(ptx: str, gpu: int) -> tuple[int, int]:
    """Registers and spilled bytes, of which the assembler tells."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = re.search(r"\.target (\w+)", ptx)[1]
        told = subprocess.run([get_ptxas(gpu).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", told)[1]), int(re.search(r"(\d+) bytes spill stores", told)[1])


def table() -> Iterator[str]:
    """The lines of the table."""
    jobs = [(variant, gpu) for variant in VARIANTS for gpu in GPUS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = iter(list(pool.map(compiled, *zip(*jobs, strict=True), chunksize=4)))
    yield "| loss | logits | " + " | ".join(f"sm_{gpu} ({name})" for gpu, name in GPUS.items()) + " |"
    yield "| --- " * (2 + len(GPUS)) + "|"
    for variant in VARIANTS:
        cells = [" / ".join(map(str, next(results))) for _ in GPUS]
        yield f"| {variant.name or 'cross-entropy'} | {variant.words} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
