"""How near to the device training comes: tokens a second, the share of its peak, and where the time goes.

    python benchmarks/roofline.py --data FILE.jsonl            # the table of benchmarks/README.md

The runs are those of benchmarks/train.py; all figures but the last are their own (docs/performance.md says what is
counted). The last is the kernel's share of the processor time of the whole process: what page faults cost, above all.
"""

import tempfile
from pathlib import Path

from train import Result, Workspace, chosen_records, command_line

PHASES = ("data", "teacher", "student", "loss", "optimizer", "waiting")


def main() -> None:
    parser = command_line(__doc__, ("fp32", "bf16"))
    args = parser.parse_args()
    print(f"| training | precision | tokens / s | padding | MFU | {' | '.join(PHASES)} | kernel |")
    print("| --- " * (6 + len(PHASES)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(Path(folder), args.model, chosen_records(args))
        for precision in args.precisions:
            for name, run in work.runs(precision).items():
                print(f"| {name} | {precision} | {' | '.join(cells(run()))} |", flush=True)


def cells(result: Result) -> list[str]:
    """Of a row."""
    metrics = result.metrics
    seconds = [metrics[f"seconds_{phase}"] for phase in PHASES]
    peak = f"{metrics['mfu']:.0%}" if "mfu" in metrics else "unknown"
    return [f"{metrics['tokens_per_second']:.0f}", f"{metrics['padding']:.0%}", peak,
            *(f"{value / sum(seconds):.0%}" for value in seconds), f"{result.usage.system_share:.0%}"]


if __name__ == "__main__":
    main()
