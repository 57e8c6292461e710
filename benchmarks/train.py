"""Training: todi with the teacher live and from its cache, SFT, and a plain loop as published, in one run.

    python benchmarks/train.py                                        # some seven minutes on 2 cores, on data/demo
    python benchmarks/train.py --model MODEL --data FILE.jsonl --samples 48

The student is a copy of the teacher with 12 of its layers, made by todi.models.prune. All variants train it by ToDi
(or SFT) on the same random samples, 4 x 2 to an optimizer step, at most 512 tokens each. Ours are runs of
`python -m todi.train`, whose own metrics are read: whole steps, data, teacher and optimizer included, evaluation and
start apart. The plain loop does what the published code does in fp32: every batch padded to 512, teacher and student
over all positions, ToDi over full (B, T, V) logits as in benchmarks/loss.py, and AdamW; it is timed over fewer steps,
which are all alike. The pass that fills a cache is timed apart: it is made once for any number of epochs and runs.
Peak memory is resident in the process, each variant in one of its own.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from launched import launched
from loss import Inputs, in_fresh_process, plain

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

from todi.criterions.linear import IGNORE_INDEX
from todi.data.batches import Batch, collate
from todi.data.records import load_records
from todi.data.tokenize import Example, encode_examples
from todi.models.backbone import backbone_and_head
from todi.models.families import family_of
from todi.models.loading import load_model, load_tokenizer
from todi.runtime.logs import peak_memory_gib

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
KEPT_LAYERS = (0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 29)
LENGTH, BATCH, ACCUMULATION, SEED = 512, 4, 2, 10


@dataclass(frozen=True)
class Usage:
    """What a process used in its steps (benchmarks/step_usage.py): seconds of processor time in the program and in the
    kernel, and pages mapped."""

    user: float
    system: float
    faults: int

    @property
    def system_share(self) -> float:
        """Of its processor time."""
        return self.system / (self.user + self.system)


@dataclass(frozen=True)
class Result:
    """Samples a second and peak memory in GiB; of a run of ours, the last line of its metrics and what it used."""

    speed: float
    memory: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))


def plain_loop(teacher_path: str, student_path: str, data: Path, steps: int) -> Result:
    """The published form of training; run in a fresh process."""
    teacher, student = (load_model(path, torch.float32, CPU) for path in (teacher_path, student_path))
    teacher.eval().requires_grad_(False)
    tokenizer = load_tokenizer(teacher_path)
    examples = encode_examples(load_records(data), tokenizer, family_of("auto", "llama"), LENGTH, LENGTH // 2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    student.train()
    start = time.perf_counter()
    for step in range(steps):
        for part in range(ACCUMULATION):
            first = (step * ACCUMULATION + part) * BATCH
            batch = padded(examples, range(first, first + BATCH), tokenizer.pad_token_id)
            with torch.no_grad():
                teacher_hidden, teacher_weight = hidden_and_weight(teacher, batch)
            hidden, weight = hidden_and_weight(student, batch)
            loss = plain(Inputs(hidden, weight, teacher_hidden, teacher_weight, batch.labels))
            (loss / len(batch.rows) / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Result(steps * ACCUMULATION * BATCH / (time.perf_counter() - start), peak_memory_gib(CPU))


def padded(examples: list[Example], samples: range, pad_id: int) -> Batch:
    """The batch of `samples`, padded to LENGTH."""
    batch = collate([examples[i] for i in samples], pad_id)
    missing = LENGTH - batch.input_ids.shape[1]
    fills = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    tensors = {name: torch.nn.functional.pad(getattr(batch, name), (0, missing), value=value)
               for name, value in fills.items()}
    return dataclasses.replace(batch, **tensors)


def hidden_and_weight(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, H) last hidden states and (V, H) head weight, whose product the plain loss begins with."""
    backbone, head = backbone_and_head(model)
    hidden = backbone(**batch.inputs, use_cache=False)
    return hidden.last_hidden_state, head.weight


class Workspace:
    """A temporary folder with data, student and caches, and the commands that run in it.

    Args:
        student: copied from `model` with fewer layers when not given.

    Attributes:
        output: of the last command.
    """

    output = ""

    def __init__(self, folder: Path, model: str, records: list[str], student: str | None = None):
        self.folder, self.model, self.student = folder, model, student or str(folder / "student")
        (folder / "train.jsonl").write_text("\n".join(records) + "\n")
        (folder / "dev.jsonl").write_text(records[0] + "\n")
        if not student:
            self.run("todi.models.prune", "--model-path", model, "--save-dir", self.student, "--keep-layers",
                     *map(str, KEPT_LAYERS))

    def run(self, module: str, *options: str, **variables: str) -> None:
        """Runs a command, with these variables in its environment."""
        environment = os.environ | launched() | {"PYTHONPATH": str(ROOT / "code"), "HF_HUB_OFFLINE": "1"} | variables
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        done = subprocess.run([sys.executable, "-m", module, *options], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(done.stdout)
        self.output = done.stdout

    def cache(self, precision: str) -> Path:
        """The teacher cache of a precision; made at the first call."""
        folder = self.folder / f"cache-{precision}"
        if not folder.is_dir():
            self.run("todi.cache", "build", str(folder), "--teacher-model-path", self.model, "--data-dir",
                     str(self.folder), "--precision", precision)
        return folder

    def train(self, precision: str, *options: str, **variables: str) -> Result:
        """A run of one epoch over all samples."""
        run = self.folder / "run"
        self.run(
            "todi.train", "--model-path", self.student, "--data-dir", str(self.folder), "--precision", precision,
            "--batch-size", str(BATCH), "--gradient-accumulation-steps", str(ACCUMULATION), "--num-epochs", "1",
            "--log-interval", "1000", "--no-eval-gen", "--seed", str(SEED), "--save-dir", str(run), "--resume", "never",
            "--plugins", str(ROOT / "benchmarks" / "step_usage.py"), "--report-to", "step_usage", *options, **variables)
        last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-2]
        usage = json.loads((run / "usage.json").read_text())
        return Result(last["samples_per_second"], last["peak_memory_gib"], last, Usage(**usage))

    def distil(self, precision: str, cached: bool, *options: str, **variables: str) -> Result:
        """ToDi from the live teacher, or from its cache."""
        cache = str(self.cache(precision)) if cached else "off"
        return self.train(precision, "--teacher-model-path", self.model, "--teacher-cache", cache, *options,
                          **variables)

    def runs(self, precision: str) -> dict[str, Callable[[], Result]]:
        """The runs of ours that are compared, by name."""
        return {"ToDi, live teacher": partial(self.distil, precision, cached=False),
                "ToDi, cached teacher": partial(self.distil, precision, cached=True),
                "SFT": partial(self.train, precision, "--criterion", "cross_entropy")}


def command_line(description: str, precisions: Sequence[str]) -> argparse.ArgumentParser:
    """What the benchmarks of training runs have in common; `precisions` are the default ones."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "model_hub/smollm2/smollm2-135m-instruct"), help="the teacher")
    parser.add_argument("--data", type=Path, default=ROOT / "data/demo/train.jsonl", help="records in JSON lines")
    parser.add_argument("--samples", type=whole_steps, default=48, metavar="N",
                        help="a multiple of 8, at least 24 (default: 48)")
    parser.add_argument("--precisions", nargs="*", default=list(precisions),
                        help=f"of our runs (default: {' '.join(precisions)})")
    return parser


def whole_steps(text: str) -> int:
    """A number of samples: three steps or more, for what a run uses is that after the second."""
    samples, step = int(text), BATCH * ACCUMULATION
    if samples % step or samples < 3 * step:
        raise argparse.ArgumentTypeError(f"must be a multiple of {step}, at least {3 * step}, got {samples}")
    return samples


def chosen_records(args: argparse.Namespace) -> list[str]:
    """Lines of `args.data`, `args.samples` random ones."""
    load_records(args.data)  # names what is wrong with them
    return random.Random(SEED).sample(args.data.read_text().splitlines(), args.samples)


def main() -> None:
    parser = command_line(__doc__, ("fp32", "bf16"))
    parser.add_argument("--plain-steps", type=int, default=2, help="optimizer steps of the plain loop (default: 2)")
    args = parser.parse_args()
    records = chosen_records(args)

    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(Path(folder), args.model, records)
        print("| training | precision | samples / s | against plain | peak memory | against SFT |")
        print("| --- | --- | --- | --- | --- | --- |")
        base = in_fresh_process(plain_loop, work.model, work.student, work.folder / "train.jsonl", args.plain_steps)
        print(f"| plain loop | fp32 | {base.speed:.2f} | 1.0× | {base.memory:.2f} GiB | – |", flush=True)
        for precision in args.precisions:
            results = {name: run() for name, run in work.runs(precision).items()}
            for name, result in results.items():
                print(f"| {name} | {precision} | {result.speed:.2f} | **{result.speed / base.speed:.1f}×** "
                      f"| {result.memory:.2f} GiB | {result.memory / results['SFT'].memory:.2f}× |", flush=True)


if __name__ == "__main__":
    main()
