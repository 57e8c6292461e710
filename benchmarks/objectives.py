"""What each objective costs beside ToDi: the loss and its gradients of one micro-batch, in one process.

    python benchmarks/objectives.py                       # SmolLM2's heads, 330 rows with a label, in 4 samples
    python benchmarks/objectives.py --rows 40 --rounds 2  # a look
    python benchmarks/objectives.py --device cuda --dtype bfloat16 --rows 4096

Rounds go through all objectives in turn, so that what else the machine does hits all of them; the time is the best of
the rounds. What moves during a run is as at its beginning: AdaKD's share is 1. Values are those of random heads, and of
no use but to see that there are some.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

from todi.criterions import DIVERGENCES, DistillationCriterion, HeadRows, LinearHead, build_divergence

SAMPLES = 4


def inputs_of(options: argparse.Namespace) -> tuple[torch.Tensor, LinearHead, HeadRows, torch.Tensor]:
    """Hidden states and head of the student, rows of the teacher, labels; logits have a standard deviation of 2."""
    generator = torch.Generator(options.device).manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=options.device).to(getattr(torch, options.dtype))

    hidden, teacher_hidden = (draw(options.rows, options.hidden) for _ in range(2))
    weight, teacher_weight = (draw(options.vocabulary, options.hidden).mul_(2 / options.hidden**0.5) for _ in range(2))
    labels = torch.randint(options.vocabulary, (options.rows,), generator=generator, device=options.device)
    teacher = HeadRows(teacher_hidden, LinearHead(teacher_weight))
    return hidden.requires_grad_(), LinearHead(weight.requires_grad_()), teacher, labels


def seconds(criterion: DistillationCriterion, inputs: tuple, device: str) -> tuple[float, float]:
    """Of forward and backward; and the divergence per row."""
    hidden, head, teacher, labels = inputs
    hidden.grad = head.weight.grad = None
    started = time.perf_counter()
    counts = [len(part) for part in labels.tensor_split(SAMPLES)]
    sums = criterion(hidden, head, labels, teacher, counts)
    sums["loss"].backward()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, sums["kd"].item() / len(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=330)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernels", default="auto")
    options = parser.parse_args()
    inputs = inputs_of(options)
    criteria = {name: DistillationCriterion(build_divergence(name), 1.0, 1.0, kernels=options.kernels)
                for name in DIVERGENCES}
    best, value = dict.fromkeys(criteria, float("inf")), {}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, criterion in criteria.items():
            taken, value[name] = seconds(criterion, inputs, options.device)
            if number:
                best[name] = min(best[name], taken)
    print(f"{options.rows} rows, V {options.vocabulary}, H {options.hidden}, {options.dtype} on {options.device}")
    print("| `KD_OBJ` | ms | of ToDi | value |", "| --- | --- | --- | --- |", sep="\n")
    for name, taken in best.items():
        print(f"| `{name}` | {taken * 1e3:.1f} | {taken / best['ToDi']:.2f} | {value[name]:.4f} |")


if __name__ == "__main__":
    main()
