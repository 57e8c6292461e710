"""Runs launchers as a user does, on tiny models, several at a time: most of a run is importing libraries."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
_TENTHS = int(os.environ.get("TENTHS", 0))
_MAKING = threading.Lock()  # several threads may ask for one model


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """The variables of a launcher that runs on the CPU."""
    ours = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable,
            "GPUS": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MFU": "0"}
    return ours | {name: str(value) for name, value in settings.items()}


def start(launcher: str, *words: str, prefix: tuple[str, ...] = (), **settings: object) -> subprocess.Popen:
    """Starts `SETTINGS PREFIX bash scripts/<launcher>.sh WORDS` on the CPU, one thread a process, in a session."""
    return subprocess.Popen([*prefix, "bash", f"scripts/{launcher}.sh", *words], cwd=ROOT, env=environment(settings),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, preexec_fn=_heed_interrupts)


def _heed_interrupts() -> None:
    """A background job ignores SIGINT, these tests may be one, and a shell cannot trap what it was born to ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(launcher: str, *words: str, prefix: tuple[str, ...] = (), **settings: object) -> subprocess.CompletedProcess:
    """Starts a launcher and waits for its end."""
    process = start(launcher, *words, prefix=prefix, **settings)
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def free_port() -> int:
    """That nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_nodes(launcher: str, settings: Mapping[str, object],
                 *changes: Mapping[str, object]) -> list[subprocess.CompletedProcess]:
    """Starts a launcher on as many nodes of this machine as there are changes to its settings; waits for their end."""
    common = {**settings, "NNODES": len(changes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(launcher, **common | {"NODE_RANK": rank} | change) for rank, change in enumerate(changes)]
    try:
        with ThreadPoolExecutor(len(processes)) as pool:  # at the same time: a pipe that nobody reads is full at 64 kB
            outputs = list(pool.map(lambda process: process.communicate(timeout=600)[0], processes))
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, output)
            for process, output in zip(processes, outputs, strict=True)]


def cores_of_this_process() -> int:
    """Of the machine's cores the share of this one of pytest's processes."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def in_ten_thousand_tries(test: Callable) -> Callable:
    """Marks a fuzz that takes the number of a thousand tries: TENTHS=10 bash scripts/test.sh --all -k ten_thousand."""
    numbered = pytest.mark.parametrize("first", range(1, 1 + max(1, _TENTHS)))(test)
    return pytest.mark.slow(pytest.mark.skipif(not _TENTHS, reason="an hour for all of TENTHS=10")(numbered))


def slow(value: object) -> object:
    """A value of a test's parameter that only `--all` takes."""
    return pytest.param(value, marks=pytest.mark.slow)


def exhaustive(value: object) -> object:
    """The same that only `--everything` takes: one more of a kind."""
    return pytest.param(value, marks=pytest.mark.exhaustive)


def in_tiers(names: Iterable[str], *, always: Collection[str] = (), slowly: Collection[str] = ()) -> list[object]:
    """Values of a test's parameter: some for every run of tests, some for `--all`, the others for `--everything`."""
    return [name if name in always else slow(name) if name in slowly else exhaustive(name) for name in names]


def write_data(folder: Path, **splits: int) -> Path:
    """Writes <split>.jsonl files of so many records that a tiny tokenizer cuts into few tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        lines = (json.dumps({"prompt": f"Write a response. {'the ' * (i % 4)}Number {i}:",
                             "output": f" The number is {i}."}) for i in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@dataclass
class Workshop:
    """A folder with tiny models and data, and launcher runs under way.

    Attributes:
        settings: for every training run: few samples, full precision.
    """

    folder: Path
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(cores_of_this_process()))

    def __post_init__(self):
        self.data = write_data(self.folder / "data" / "tiny", train=18, dev=4, valid=6)
        self.settings = {"DATA_DIR": self.data, "EPOCH": 1, "MAX_LENGTH": 64, "MAX_PROMPT_LENGTH": 48,
                         "PRECISION": "fp32", "LOG_INTERVAL": 1, "LORA_RANK": 4, "LR": 1e-2, "TEACHER_CACHE": "off"}

    def model(self, name: str, make: Callable[..., Path] = tiny_model, **shape: object) -> Path:
        """A tiny model with the tokenizer that all of them share; one of that name and shape is made once."""
        described = ",".join([make.__name__, *(f"{option}={value}" for option, value in sorted(shape.items()))])
        path = self.folder / "models" / described / name
        with _MAKING:
            if not path.exists():
                unfinished = path.parent / f".{name}.unfinished"
                tokenizer = tiny_tokenizer(unfinished)
                make(unfinished, **{"vocab": len(tokenizer)} | shape)
                shutil.move(unfinished, path)
        return path

    def train(self, launcher: str, name: str, *words: str, **settings: object) -> "Future[Run]":
        """Starts a training run under the folder name `name`."""
        def work() -> Run:
            done = run(launcher, *words, **self.settings | {"SAVE_DIR": self.folder / "runs" / name} | settings)
            return Run(self.folder / "runs" / name, done.returncode, done.stdout)
        return self.pool.submit(work)


    def evaluate(self, launcher: str, model: Path) -> "Future[subprocess.CompletedProcess]":
        """Starts an evaluation of a checkpoint with one seed."""
        return self.pool.submit(run, launcher, str(model), DATA_DIR=self.data.parent, SETS="tiny", SEEDS=1,
                                MAX_LENGTH=64, MAX_PROMPT_LENGTH=48, PRECISION="fp32")


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    folder: Path
    exit_code: int
    output: str

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("epoch*"))

    @property
    def checkpoint(self) -> Path:
        """The only checkpoint of a run that went well."""
        assert self.exit_code == 0, self.output
        checkpoint, = self.checkpoints
        return checkpoint

    def metrics(self, kind: str) -> list[dict]:
        """The lines of one kind in metrics.jsonl."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]
