"""What is shown of a rank that was stopped is where it was stopped."""

import os
import subprocess
import sys

from launching import ROOT
from todi.runtime.nursing import Nurse
from todi.runtime.whereabouts import RANKS_FOLDER

# The other threads are the quicker ones to take what was sent to the whole process, and the first has gone on by then.
_STOPPED = """
import os, signal, threading
from todi.runtime.distributed import World
from todi.runtime.heartbeat import start_heart

start_heart(World(rank=0, size=1, local_rank=0, local_size=1))
for _ in range(20):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
os.setpriority(os.PRIO_PROCESS, 0, 19)  # of this thread alone, where the system is Linux

def where_it_was_stopped():
    os.kill(os.getpid(), signal.SIGSTOP)

where_it_was_stopped()
while True:
    pass
"""


def test_the_stacks_of_a_stopped_rank(tmp_path, capfd):
    rank = subprocess.Popen([sys.executable, "-c", _STOPPED],
                            env=os.environ | {RANKS_FOLDER: str(tmp_path), "PYTHONPATH": str(ROOT / "code")})
    with Nurse(tmp_path, limit=1, launcher=None) as nurse:
        rank.wait(60)
    assert nurse.final_verdict().startswith("rank 0 has been in its start for ")
    shown = capfd.readouterr().err
    assert f"rank 0 (pid {rank.pid}) is in its start; its stacks:\n" in shown
    assert "in where_it_was_stopped" in shown
