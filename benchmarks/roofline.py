"""How near to the device training comes: tokens a second, the share of its peak, and where the time goes.

    python benchmarks/roofline.py --data FILE.jsonl            # the table of benchmarks/README.md

The runs are those of benchmarks/train.py, and all figures but the last two their own (docs/performance.md says what is
counted). The last two are of the steps but the first two: pages mapped in a second of processor time, and the share of
it that is the kernel's, for page faults and all else.
"""

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
        for precision in args.precisions:
            for name, run in work.runs(precision).items():
                print(f"| {name} | {precision} | {' | '.join(cells(run()))} |", flush=True)


def cells(result: Result) -> list[str]:
    """Of a row."""
    metrics = result.metrics
    seconds, usage = [metrics[f"seconds_{phase}"] for phase in PHASES], result.usage
    peak = f"{metrics['mfu']:.0%}" if "mfu" in metrics else "unknown"
    return [f"{metrics['tokens_per_second']:.0f}", f"{metrics['padding']:.0%}", peak,
            *(f"{value / sum(seconds):.0%}" for value in seconds),
            f"{usage.faults / (usage.user + usage.system):,.0f}", f"{usage.system_share:.1%}"]


if __name__ == "__main__":
    main()
