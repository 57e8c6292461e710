"""The distillation loss and its gradients: todi's, in chunks, beside a plain one over full logits.

    python benchmarks/loss.py                 # the tables of benchmarks/README.md, some five minutes on 2 cores
    python benchmarks/loss.py --all-plain     # the plain loss at the large vocabularies too: over 20 GB
    python benchmarks/loss.py --device cuda

The plain loss makes the passes of the published ToDi code: the head over every position of the batch, prompt and
padding included, four softmaxes of (B, T, V) in float32, the forward and the reverse part as full tensors, the mask
last, and autograd behind it all. Both get the same (B, T, H) hidden states, of which a share of the positions carries
a label; picking those rows is part of ours.

Each measurement has a process of its own. Peak extra memory is the high-water mark of the first call, forward and
backward with the gradients it leaves, above the level before it; time is the best of the calls after it, in rounds
that alternate between the two losses.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from launched import as_launched
from torch import Tensor
from torch.nn import functional

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

from todi.criterions import DIVERGENCES, LinearHead, build_divergence, linear_distillation_loss
from todi.criterions.linear import IGNORE_INDEX

KD_RATE = 0.5
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Case:
    """B sequences of T positions, `labelled` of them with a label; hidden size H and vocabulary V of both models."""

    vocabulary: int
    hidden: int
    labelled: int = 330
    batch: int = 4
    length: int = 512


CASES = {"SmolLM2": Case(49_152, 576), "Qwen2.5": Case(151_936, 896), "Gemma 3": Case(262_144, 640)}
SCALING = [Case(49_152, 576, labelled) for labelled in (165, 330, 660, 1320)]


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @classmethod
    def of(cls, case: Case, device: str, dtype: torch.dtype = torch.float32) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        # the heads' scale gives logits a standard deviation of 2, about that of a language model
        hidden, weight = draw(case.batch, case.length, case.hidden), draw(case.vocabulary, case.hidden)
        teacher_hidden, teacher_weight = draw(*hidden.shape), draw(*weight.shape)
        for head in (weight, teacher_weight):
            head.mul_(2 / case.hidden**0.5)
        positions = case.batch * case.length
        labels = torch.randint(case.vocabulary, (positions,), generator=generator, device=device)
        labels[torch.randperm(positions, generator=generator, device=device)[case.labelled:]] = IGNORE_INDEX
        return cls(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight,
                   labels.view(case.batch, case.length))


def plain(inputs: Inputs) -> Tensor:
    """ToDi and cross-entropy over full (B, T, V) logits."""
    logits, teacher_logits = inputs.hidden @ inputs.weight.T, inputs.teacher_hidden @ inputs.teacher_weight.T
    ce = functional.cross_entropy(logits.flatten(0, 1), inputs.labels.flatten(), reduction="sum",
                                  ignore_index=IGNORE_INDEX)
    q, p = logits.softmax(-1, torch.float32), teacher_logits.softmax(-1, torch.float32)
    log_q, log_p = logits.log_softmax(-1, torch.float32), teacher_logits.log_softmax(-1, torch.float32)
    forward_weight = torch.sigmoid(log_p - log_q).detach()
    reverse_weight = torch.sigmoid(log_q - log_p).detach()
    forward = forward_weight * p * (log_p - log_q)
    reverse = reverse_weight * q * (log_q - log_p)
    infinite = logits.isinf() | teacher_logits.isinf()
    kd = (forward + reverse).masked_fill(infinite, 0).sum(-1)
    kd = kd.masked_fill(inputs.labels == IGNORE_INDEX, 0).sum()
    return (1 - KD_RATE) * ce + KD_RATE * kd


def ours(inputs: Inputs, objective: str = "ToDi") -> Tensor:
    rows = inputs.labels != IGNORE_INDEX
    return linear_distillation_loss(inputs.hidden[rows], LinearHead(inputs.weight), inputs.teacher_hidden[rows],
                                    LinearHead(inputs.teacher_weight), inputs.labels[rows],
                                    divergence=build_divergence(objective), kd_rate=KD_RATE).loss


LOSSES = {"plain": plain, "todi": ours}


def step(loss: str, inputs: Inputs) -> Tensor:
    inputs.hidden.grad = inputs.weight.grad = None
    value = LOSSES[loss](inputs)
    value.backward()
    return value.detach()


def measure(loss: str, case: Case, device: str, calls: int) -> tuple[float, int]:
    """Best time in seconds and peak extra memory in bytes; run in a fresh process."""
    step(loss, Inputs.of(Case(64, 8, 4, 2, 8), device))  # loads libraries, starts threads
    inputs = Inputs.of(case, device)
    memory = CudaMemory() if device == "cuda" else HostMemory()
    step(loss, inputs)
    peak = memory.extra_peak()
    return best_seconds(lambda: step(loss, inputs), device, calls), peak


def best_seconds(function: Callable[[], object], device: str, calls: int = 3) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


class HostMemory:
    """Peak resident memory since it was made, from Linux, which can set the mark back (man 5 proc, clear_refs)."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.read("VmRSS")

    @staticmethod
    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    def extra_peak(self) -> int:
        return self.read("VmHWM") - self.before


class CudaMemory:
    def __init__(self):
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def extra_peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


def errors(case: Case, device: str) -> dict[str, float]:
    """Relative errors of ours against the plain one: of the value, and of both gradients in the 2-norm."""
    inputs, results = Inputs.of(case, device), {}
    for loss in LOSSES:
        value = step(loss, inputs)
        results[loss] = {"value": value, "d hidden": inputs.hidden.grad, "d weight": inputs.weight.grad}
    return {name: ((found - results["plain"][name]).norm() / results["plain"][name].norm()).item()
            for name, found in results["todi"].items()}


def bandwidth_share(case: Case, device: str) -> float:
    """Of the device's copy bandwidth, what the work between the matrix products reaches.

    Its time is that of the whole call less that of the call's four products. The least that it must move is the
    student's and the teacher's logits in and their gradient out, 3 N V numbers.
    """
    inputs = Inputs.of(case, device)
    hidden, weight = inputs.hidden.detach().flatten(0, 1)[:case.labelled], inputs.weight.detach()
    logits = torch.zeros(case.labelled, case.vocabulary, device=device)
    copied, d_weight = torch.zeros_like(logits), torch.zeros_like(weight)
    products = (2 * best_seconds(lambda: torch.mm(hidden, weight.T, out=copied), device)
                + best_seconds(lambda: logits @ weight, device)
                + best_seconds(lambda: d_weight.addmm_(logits.T, hidden), device))
    between = best_seconds(lambda: step("todi", inputs), device, 5) - products
    bandwidth = 2 * logits.nbytes / best_seconds(lambda: copied.copy_(logits), device)
    return 3 * logits.nbytes / between / bandwidth


def divergence_seconds(name: str, device: str) -> tuple[float, float]:
    """Best times of value and gradient of 4 MiB of log-probabilities, by the closed form and by autograd."""
    divergence, generator = build_divergence(name), torch.Generator(device).manual_seed(0)
    log_p, log_q = ((2 * torch.randn(21, 49_152, generator=generator, device=device)).log_softmax(-1) for _ in range(2))
    labels = torch.zeros(21, dtype=torch.long, device=device)
    return (best_seconds(lambda: divergence.value_and_gradient(log_p, log_q, labels), device, 10),
            best_seconds(lambda: divergence.value_and_autograd(log_p, log_q, labels), device, 10))


def in_fresh_process(function, *args, ours=False):
    """What the function returns in a process of its own: one of `ours` is as a launcher would start it."""
    with as_launched() if ours else nullcontext(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def compare(case: Case, losses: list[str], device: str, rounds: int) -> dict[str, tuple[float, int]]:
    """Best time and largest peak of each loss over alternating rounds."""
    taken = [[in_fresh_process(measure, loss, case, device, 3, ours=loss == "todi") for loss in losses]
             for _ in range(rounds)]
    return {loss: (min(time for time, _ in column), max(peak for _, peak in column))
            for loss, column in zip(losses, zip(*taken, strict=True), strict=True)}


def comparison(name: str, case: Case, losses: list[str], device: str, rounds: int) -> str:
    """The rows of one case in the table of main()."""
    measured = compare(case, losses, device, rounds)
    error = in_fresh_process(errors, case, device) if "plain" in losses else {}
    lines = []
    for loss, (best, peak) in measured.items():
        shown = [f"{value:.0e}" for value in error.values()] if loss == "todi" and error else ["–"] * 3
        lines.append(" | ".join(["", name, f"{case.vocabulary:,}", str(case.hidden), loss, f"{best:.2f} s",
                                 f"{peak / MEGABYTE:,.0f} MB", *shown, ""]).strip())
    if "plain" in losses:
        faster, leaner = (a / b for a, b in zip(measured["plain"], measured["todi"], strict=True))
        lines.append(f"| | | | plain / todi | **{faster:.1f}×** | **{leaner:.1f}×** | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--all-plain", action="store_true", help="run the plain loss at every vocabulary")
    parser.add_argument("--rounds", type=int, default=3, help="alternations between the losses (default: 3)")
    args = parser.parse_args()

    print("| models | V | H | loss | time | peak extra memory | error of value | of d hidden | of d weight |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, case in CASES.items():
        losses = ["plain", "todi"] if name == "SmolLM2" or args.all_plain else ["todi"]
        print(comparison(name, case, losses, args.device, args.rounds), flush=True)

    print("\n| labelled rows | time | time per row | peak extra memory less the gradients |")
    print("| --- | --- | --- | --- |", flush=True)
    for case in SCALING:
        best, peak = compare(case, ["todi"], args.device, args.rounds)["todi"]
        gradients = 4 * case.hidden * (case.vocabulary + case.batch * case.length)
        print(f"| {case.labelled} | {best:.2f} s | {1000 * best / case.labelled:.2f} ms "
              f"| {(peak - gradients) / MEGABYTE:.0f} MB |", flush=True)

    print("\n| divergence | value and gradient of a block | by autograd |\n| --- | --- | --- |", flush=True)
    for name in DIVERGENCES:
        closed, autograd = in_fresh_process(divergence_seconds, name, args.device, ours=True)
        print(f"| {name} | {1000 * closed:.1f} ms | {1000 * autograd:.1f} ms |", flush=True)

    share = in_fresh_process(bandwidth_share, CASES["SmolLM2"], args.device)
    print(f"\nThe work between the matrix products reaches {share:.0%} of the copy bandwidth ({args.device}).")


if __name__ == "__main__":
    main()
