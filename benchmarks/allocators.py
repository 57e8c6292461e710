"""Allocators on a CPU: speed, page faults and peak memory of one training run under each of them.

    python benchmarks/allocators.py --data FILE.jsonl --preload /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4

The run is that of benchmarks/train.py, ToDi from the cached teacher. What ALLOCATOR=glibc does is compared with the
system's own, with glibc's tunables, and with libraries that are loaded before it. The losses must be the same in every
digit. Page faults and the kernel's share of the processor time are those of the steps but the first two. The other
processor time is that of the main thread, which another process on the machine makes no longer.
"""

import sys
import tempfile
from pathlib import Path

from roofline import PHASES
from train import Result, Workspace, chosen_records, command_line

TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"


def main() -> None:
    parser = command_line(__doc__, ("bf16", "fp32"))
    parser.add_argument("--preload", nargs="*", default=[], help="libraries with an allocator")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--live", action="store_true", help="from the live teacher")
    args = parser.parse_args()
    none = {"LD_PRELOAD": ""}
    variants = {"`ALLOCATOR=system`": ("system", none), "`ALLOCATOR=glibc`": ("glibc", none),
                "`GLIBC_TUNABLES`": ("auto", none | {"GLIBC_TUNABLES": TUNABLES}), "a launcher's": ("auto", {})}
    variants |= {f"`{Path(library).name}`": ("auto", {"LD_PRELOAD": library}) for library in args.preload}

    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(Path(folder), args.model, chosen_records(args))
        print("| allocator | precision | samples / s | processor time a sample | page faults | kernel's share | peak "
              "memory |\n| --- | --- | --- | --- | --- | --- | --- |")
        for precision in args.precisions:
            losses = set()
            for _ in range(args.rounds):
                for name, (allocator, variables) in variants.items():
                    result = work.distil(precision, not args.live, "--allocator", allocator, **variables)
                    losses.add(result.metrics["loss"])
                    print(f"| {name} | {precision} | {cells(result, args.samples)} |", flush=True)
            print(f"\n{precision}: {len(losses)} different losses", file=sys.stderr)


def cells(result: Result, samples: int) -> str:
    """Of a row."""
    busy = sum(result.metrics[f"seconds_{phase}"] for phase in PHASES if phase != "waiting")
    return (f"{result.speed:.2f} | {busy / samples:.2f} s | {result.usage.faults / 1e6:.2f} M "
            f"| {result.usage.system_share:.0%} | {result.memory:.2f} GiB")


if __name__ == "__main__":
    main()
