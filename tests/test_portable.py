"""What macOS lacks: bash newer than 3.2, /proc, nproc."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment
from todi.runtime.logs import peak_resident_bytes
from todi.training import memory

SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), *(ROOT / "scripts").rglob("*.sbatch"), ROOT / ".ci" / "run"]
# What bash 3.2 does not know, or takes for an unset variable
NEWER = re.compile(r"\b(mapfile|readarray|coproc|globstar|EPOCHSECONDS)\b|(declare|local|typeset) -[aglrux]*[An]\b"
                   r"|\$\{\w+(\[[^]]*\])?(,|\^|@[A-Za-z]\})|\[\[ -v |&>>|\|&|wait -n|;;&|\$\{\w+: -|@\(|printf '%\(")
COMMANDS = ("bash", "dirname", "tr", "grep", "cat", "env", "getconf")


def code_of(text: str) -> str:
    return re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_script_is_for_bash_3_2(file):
    text = code_of(file.read_text())
    assert not [found[0] for found in NEWER.finditer(text)]
    empty = set(re.findall(r"\b(\w+)=\(\)", text))
    assert not [name for name in empty if re.search(rf'(?<!\+)"\$\{{{name}\[@\]}}"', text)]


@pytest.mark.parametrize("code", ["mapfile -t a", "declare -A a", "x=${a,,}", "[[ -v a ]]", "local -n b=a", "x=${a@Q}",
                                  "[[ $a == @(b|c) ]]"])
def test_what_is_newer_is_seen(code):
    assert NEWER.search(code)


def test_a_launcher_without_nproc_and_pgrep(tmp_path):
    """With no command on its PATH but those that it needs."""
    for name in COMMANDS:
        (tmp_path / name).symlink_to(shutil.which(name))
    settings = {"PATH": tmp_path, "DRY_RUN": 1, "SAVE_DIR": "outputs/x y", "TEACHER_MODEL_PATH": "teacher",
                "OMP_NUM_THREADS": "", "GPUS": "CPU"}
    done = subprocess.run(["bash", "scripts/gpt2/vanilla_kd_gpt2_base.sh"], cwd=ROOT, env=environment(settings),
                          text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{sys.executable} -m todi.train ")
    assert done.stdout.rstrip().endswith(r"--save-dir outputs/x\ y")


def test_memory_without_proc(monkeypatch, tmp_path):
    known = memory.available_bytes(torch.device("cpu"), 1)
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert known <= memory.available_bytes(torch.device("cpu"), 1) < 1 << 50
    assert memory.resident_bytes() == peak_resident_bytes() > 10 << 20


def test_peak_memory_is_in_bytes(monkeypatch):
    """The unit differs between systems."""
    here = peak_resident_bytes()
    status = Path("/proc/self/status")
    if status.is_file():
        kilobytes = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        assert here == pytest.approx(kilobytes << 10, rel=0.05)
    monkeypatch.setattr(sys, "platform", "darwin" if sys.platform != "darwin" else "linux")
    assert peak_resident_bytes() != pytest.approx(here, rel=0.5)
