"""How far two runs are apart that should do the same."""

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Differences:
    """The largest ones, relative to what one of the runs has.

    Attributes:
        loss, norm: of a line in the log of training: the loss, and the norm of the gradients.
        dev: of the loss on dev.
        weights: of a weight of the last checkpoint, relative to the largest weight.
    """

    loss: float
    norm: float
    dev: float
    weights: float

    def are_within(self, limit: float) -> bool:
        """Whether all are at most that; not so where one is no number."""
        return all(one <= limit for one in astuple(self))


def differences(folder: Path, expected: Path) -> Differences:
    """Of the run in a folder to that in another. Raises ValueError where they have other steps, or other weights."""
    for kind in ("train", "dev"):
        ours, theirs = ([line["step"] for line in told(one, kind)] for one in (folder, expected))
        if ours != theirs or not ours:
            raise ValueError(f"{folder} has {kind} lines of the steps {ours}, {expected} of {theirs}")
    ours, theirs = (load_file(_last_weights(one)) for one in (folder, expected))
    shapes, others = ({(name, weight.shape) for name, weight in one.items()} for one in (ours, theirs))
    if shapes != others:
        names = ", ".join(sorted({name for name, _ in shapes ^ others}))
        raise ValueError(f"only one of {folder} and {expected} has {names}, or each in another shape")
    apart = _largest({name: ours[name].double() - one for name, one in theirs.items()})
    return Differences(loss=_relative(folder, expected, "train", "loss"),
                       norm=_relative(folder, expected, "train", "gradient_norm"),
                       dev=_relative(folder, expected, "dev", "loss"),
                       weights=apart / _largest(theirs))


def told(folder: Path, kind: str) -> list[dict]:
    """The lines of a kind in metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def _relative(folder: Path, expected: Path, kind: str, name: str) -> float:
    """The largest relative difference of a number; NaN where one is none."""
    ours, theirs = (torch.tensor([float("nan") if line[name] is None else line[name] for line in told(one, kind)],
                                 dtype=torch.double) for one in (folder, expected))
    return ((ours - theirs).abs() / theirs.abs()).max().item()


def _largest(weights: dict[str, Tensor]) -> float:
    return torch.stack([one.abs().max() for one in weights.values()]).max().item()


def _last_weights(folder: Path) -> Path:
    """Those of the latest epoch."""
    return max(folder.glob("epoch*/*.safetensors"), key=lambda path: int(path.parent.name.split("_")[0][len("epoch"):]))
