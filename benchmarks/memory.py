"""The doctor's estimate of a run's memory beside the measured peak, on a CPU.

    python benchmarks/memory.py --model model_hub/smollm2/smollm2-135m-instruct \\
        --student model_hub/smollm2/smollm2-12-layers --data data/demo       # the table of benchmarks/README.md

Both are of the whole training process: everything that is resident, the interpreter and its libraries included. The
estimate is what the run itself logs before it loads weights; the measured peak is the kernel's ru_maxrss of the
process at its last step. Each run passes once over 64 records and generates nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from launched import launched

ROOT = Path(__file__).parents[1]
RECORDS, BATCH, LENGTH = 64, 4, 512

# options besides the models, by the name in the table; "teacher" distils into the pruned student
RUNS = {
    "ToDi into the student, full, fp32": ["teacher", "--precision", "fp32"],
    "ToDi into the student, full, bf16": ["teacher", "--precision", "bf16"],
    "ToDi, LoRA (rank 64) on the student, bf16": ["teacher", "--precision", "bf16", "--peft", "lora",
                                                  "--peft-lora-r", "64"],
    "SFT of the model, full, fp32, ZeRO stage 0": ["--precision", "fp32", "--zero-stage", "0"],
    "SFT of the model, LoRA (rank 64), bf16": ["--precision", "bf16", "--peft", "lora", "--peft-lora-r", "64"],
    "SFT of the model, full, fp32, checkpointing": ["--precision", "fp32", "--gradient-checkpointing"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True, help="a smaller one with the same tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--only", default="", help="run those whose name has this in it")
    options = parser.parse_args()
    print("| run | steps | estimated | measured | error | seconds a step |\n| --- | --- | --- | --- | --- | --- |")
    for name, words in RUNS.items():
        if options.only in name:
            print(f"| {name} | {row(options, words)} |", flush=True)


def row(options: argparse.Namespace, words: list[str]) -> str:
    """The cells of one run."""
    if words[0] == "teacher":
        words = ["--model-path", options.student, "--teacher-model-path", options.model, *words[1:]]
    else:
        words = ["--model-path", options.model, "--criterion", "cross_entropy", *words]
    with tempfile.TemporaryDirectory() as folder:
        log = train(folder, options.data, words)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    estimated = float(re.search(r"memory: about ([\d.]+) GiB", log)[1])
    steps = [line for line in lines if line["kind"] == "train"]
    measured = steps[-1]["peak_memory_gib"]
    return (f"{len(steps)} | {estimated:.2f} GiB | {measured:.2f} GiB | {100 * (estimated / measured - 1):+.0f} % | "
            f"{steps[-1]['seconds'] / len(steps):.1f}")


def train(folder: str, data: Path, words: list[str]) -> str:
    """Runs todi.train and returns its log."""
    command = [sys.executable, "-m", "todi.train", "--save-dir", folder, "--data-dir", data, "--train-num", RECORDS,
               "--dev-num", 2, "--no-eval-gen", "--log-interval", 1, "--num-epochs", 1, "--batch-size", BATCH,
               "--gradient-accumulation-steps", 2, "--max-length", LENGTH, *words]
    environment = os.environ | launched() | {"PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "",
                                             "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([str(word) for word in command], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(done.stdout)
    return done.stdout


if __name__ == "__main__":
    main()
