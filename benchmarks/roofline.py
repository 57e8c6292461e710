"""How near to the device training comes: tokens a second, the share of its peak, and where the time goes.

    python benchmarks/roofline.py --data FILE.jsonl            # the table of benchmarks/README.md

The runs are those of benchmarks/train.py, and all figures but the last two their own (docs/performance.md says what is
counted). MFU is of the highest peak that one of the runs of a precision has found: each looks for a second, and a
virtual machine is not always as fast. The last two are of the steps but the first two: pages mapped in a second of
processor time, and the share of it that is the kernel's, for page faults and all else.
"""

import re
import tempfile
from pathlib import Path

from train import Result, Workspace, chosen_records, command_line

PHASES = ("data", "teacher", "student", "loss", "optimizer", "waiting")


def main() -> None:
    parser = command_line(__doc__, ("fp32", "bf16"))
    args = parser.parse_args()
    print(f"| training | precision | tokens / s | padding | MFU | {' | '.join(PHASES)} | page faults / s | "
          "kernel |")
    print("| --- " * (7 + len(PHASES)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(Path(folder), args.model, chosen_records(args))
        peaks = {}
        for precision in args.precisions:
            found = {name: (run(), peak_of_the_run(work.output)) for name, run in work.runs(precision).items()}
            peaks[precision] = highest = max(peak for _, peak in found.values())
            for name, (result, peak) in found.items():
                print(f"| {name} | {precision} | {' | '.join(cells(result, peak / highest))} |", flush=True)
    print("\nMFU is of", ", ".join(f"{peak:.0f} GFLOP/s in {precision}" for precision, peak in peaks.items()))


def peak_of_the_run(output: str) -> float:
    """GFLOP/s of the device as the log of a run has it; those of a device that is not known count as 1."""
    found = re.search(r"peak of the device: (\d+) GFLOP/s", output)
    return float(found[1]) if found else 1.0


def cells(result: Result, share: float) -> list[str]:
    """Of a row; `share` is the run's own peak as one of the highest."""
    metrics = result.metrics
    seconds, usage = [metrics[f"seconds_{phase}"] for phase in PHASES], result.usage
    mfu = f"{metrics['mfu'] * share:.0%}" if "mfu" in metrics else "unknown"
    return [f"{metrics['tokens_per_second']:.0f}", f"{metrics['padding']:.0%}", mfu,
            *(f"{value / sum(seconds):.0%}" for value in seconds),
            f"{usage.faults / (usage.user + usage.system):,.0f}", f"{usage.system_share:.1%}"]


if __name__ == "__main__":
    main()
