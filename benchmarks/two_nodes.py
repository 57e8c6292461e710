"""Two nodes, each in a network and with a /tmp and a name of its own, and one folder that both share: a run on them is
preempted, goes on, and must end as one on one node with as many ranks does that nothing disturbs.

    sudo .venv/bin/python benchmarks/two_nodes.py --stages 1 3

It needs Linux, root, `ip` (Debian: iproute2), and pytest's side of the project (`bash scripts/test.sh` installs that).
Prints a table for benchmarks/README.md; exit code 1 when a weight differs.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from launching import ROOT, Workshop, environment
from stopping import KD, finished, outcome, resumable

NAMES = ("todi-node0", "todi-node1")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
DEVICE = "todi-link"
PREEMPT_AFTER = "step 4/"
# In a namespace of mounts and a host name of its own: hides /tmp, but for the repository and the shared folder.
ENTER = """set -e
hostname "$1"; shift
mount --rbind / /mnt
mount -t tmpfs none /tmp
for place in "$ROOT" "$SHARED"; do
  mkdir -p "$place"
  mountpoint -q "$place" || mount --rbind "/mnt$place" "$place"
done
exec bash "$@"
"""


def main() -> None:
    """Set up, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], help="ZeRO stages")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("ip"):
        sys.exit("two_nodes.py makes network namespaces, for which it must be root and have ip (Debian: iproute2)")
    rows = []
    with tempfile.TemporaryDirectory(prefix="todi-shared-") as folder, two_networks():
        shared = Path(folder)
        settings = resumable(Workshop(shared)) | {"GRAD_ACC": 1, "EPOCH": 3}
        for stage in arguments.stages:
            rows.append(one_stage(shared, settings | {"ZERO_STAGE": stage}, stage))
    print("| ZeRO stage | preempted after | seconds to its end | goes on from | seconds in all | against one node |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")
    sys.exit(any(row[-1] != "identical" for row in rows))


def one_stage(shared: Path, settings: Mapping[str, object], stage: int) -> list[str]:
    """The cells of a row: what came of a run on two nodes that was preempted once."""
    folder, started = shared / f"run{stage}", time.perf_counter()
    nodes = [start(shared, rank, settings | {"SAVE_DIR": folder, "RENDEZVOUS_ID": "first"}) for rank in range(2)]
    said = wait_for(nodes[0], PREEMPT_AFTER)
    asked = time.perf_counter()
    for node in nodes:  # as SLURM does
        node.send_signal(signal.SIGUSR1)
    codes = [(node.communicate(timeout=300)[0], node.returncode) for node in nodes]
    ended = time.perf_counter() - asked
    check([128 + signal.SIGUSR1] * 2, codes)
    nodes = [start(shared, rank, settings | {"SAVE_DIR": folder, "RENDEZVOUS_ID": "second"}) for rank in range(2)]
    codes = [(node.communicate(timeout=300)[0], node.returncode) for node in nodes]
    check([0, 0], codes)
    seconds = time.perf_counter() - started
    place = re.search(r"going on from \S+/(\S+): ", codes[0][0])
    same = outcome(folder) == finished(shared / f"whole{stage}", **settings, NPROC=2)
    return [str(stage), re.search(r"step \d+/\d+", said)[0], f"{ended:.1f}", place[1] if place else "nothing",
            f"{seconds:.0f}", "identical" if same else "DIFFERENT"]


def start(shared: Path, rank: int, settings: Mapping[str, object]) -> subprocess.Popen:
    """The launcher on one of the nodes."""
    of_node = {"NNODES": 2, "NODE_RANK": rank, "NPROC": 1, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500,
               "GLOO_SOCKET_IFNAME": DEVICE, "ROOT": ROOT, "SHARED": shared}
    command = ("ip", "netns", "exec", NAMES[rank], "unshare", "--mount", "--uts", "bash", "-c", ENTER, "enter",
               f"node{rank}", f"scripts/{KD}.sh")
    return subprocess.Popen(command, cwd=ROOT, env=environment(settings | of_node), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(process: subprocess.Popen, text: str) -> str:
    """The line of its output that has it."""
    output = []
    for line in process.stdout:
        output.append(line)
        if text in line:
            return line
    sys.exit(f"it ended before {text}:\n{''.join(output)}")


def check(wanted: list[int], ends: list[tuple[str, int]]) -> None:
    """Exits, with all that the nodes said, where an exit code is another one."""
    if [code for _, code in ends] != wanted:
        sys.exit("\n".join(f"exit code {code}, wanted {want}:\n{output}"
                           for want, (output, code) in zip(wanted, ends, strict=True)))


@contextmanager
def two_networks() -> Iterator[None]:
    """Two network namespaces with a cable between them, until the block ends."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", DEVICE, "netns", NAMES[0], "type", "veth", "peer", "name", DEVICE, "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def ip(*words: str) -> None:
    """Runs it."""
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    main()
