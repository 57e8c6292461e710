"""Kills a training run again and again at random moments and compares its end with that of a run left in peace.

    python benchmarks/kills.py --kills 200

It needs pytest's side of the project (`bash scripts/test.sh` installs that): models, data and launchers are those of
tests/test_resume.py. Prints a row for benchmarks/README.md; exit code 1 when the two runs differ in a bit.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from launching import Workshop
from stopping import finished, killed_again_and_again, resumable


def main() -> None:
    """Parse, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # three steps an epoch, a state after each; enough epochs that no run ends before its last kill
        settings = resumable(Workshop(Path(folder))) | {
            "EPOCH": 3 * arguments.kills, "SAVE_STATE_EVERY": 1, "SAVE_BEST_N_CKPTS": 2}
        killed = killed_again_and_again(Path(folder) / "killed", arguments.kills, arguments.seed, **settings)
        whole = finished(Path(folder) / "whole", **settings)
    same = {name: killed[name] == whole[name] for name in whole}
    print("| kills | steps | minutes | " + " | ".join(same) + " |")
    print(f"| {arguments.kills} | {9 * arguments.kills} | {(time.perf_counter() - started) / 60:.0f} | "
          + " | ".join("identical" if equal else "DIFFERENT" for equal in same.values()) + " |")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
