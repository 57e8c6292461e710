"""Draws docs/pictures/weight.png: what ToDi's weight does.  python docs/pictures/weight.py

Left: the weight w = sigmoid(β log p/q) of forward KL in the mixture, over log p/q. Right: the gradient of each
divergence by the student's logit of one token that the teacher gives a probability of 0.1, over the student's q, where
the rest of the vocabulary is one other token; by autograd, from what the package computes.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws a file, needs no screen
import matplotlib.pyplot as plt
import torch
from todi.criterions import build_divergence

TEACHER = 0.1
NAMES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "ToDi": "ToDi"}
COLOURS = {"forward_kl": "C0", "reverse_kl": "C1", "ToDi": "C2"}


def logits(probability: torch.Tensor) -> torch.Tensor:
    """(N,) probabilities of the first of two tokens -> (N, 2) logits."""
    return torch.stack([probability.logit(), torch.zeros_like(probability)], dim=-1)


def gradients(name: str, q: torch.Tensor) -> torch.Tensor:
    """(N,) derivatives of a divergence by the student's logit of the first token, where it gives it q."""
    student = logits(q).requires_grad_()
    build_divergence(name)(student, logits(torch.full_like(q, TEACHER)), temperature=1.0).sum().backward()
    return student.grad[:, 0]


def draw_weight(axis: plt.Axes) -> None:
    ratio = torch.linspace(-5, 5, 200)
    axis.plot(ratio, ratio.sigmoid(), color=COLOURS["ToDi"], linewidth=2, label="ToDi, β = 1")
    for beta, style in ((0.0, ":"), (3.0, "--")):
        axis.plot(ratio, (beta * ratio).sigmoid(), color="grey", linestyle=style, label=f"β = {beta:g}")
    axis.set(title="weight of forward KL at a token", xlabel="log p/q", ylabel="w = sigmoid(β log p/q)")
    axis.text(-4.8, 0.66, "student over-rates:\nreverse KL", fontsize="small")
    axis.text(1.6, 0.3, "student under-rates:\nforward KL", fontsize="small")
    axis.legend(fontsize="small", loc="upper left")


def draw_gradients(axis: plt.Axes) -> None:
    q = torch.logspace(-3, -0.01, 300, dtype=torch.float64)
    for name, label in NAMES.items():
        axis.plot(q, -gradients(name, q), color=COLOURS[name], linewidth=2, label=label)
    axis.axvline(TEACHER, color="grey", linewidth=1)
    axis.axhline(0, color="grey", linewidth=1)
    axis.set(title=f"pull on a token's logit, p = {TEACHER}", xscale="log", xlabel="the student's q (log scale)",
             ylabel="up (+) or down (−)")
    axis.set_ylim(top=0.3)
    axis.text(TEACHER * 0.9, 0.2, "q < p: under-rated", ha="right", fontsize="small")
    axis.text(TEACHER * 1.1, 0.2, "q > p: over-rated", fontsize="small")
    axis.legend(fontsize="small", loc="lower left")


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    draw_weight(left)
    draw_gradients(right)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
