"""The best N models of a run, each in a folder that transformers loads directly."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.runtime.storage import discard, publish, sweep, unfinished, writing
from todi.training.student import is_partitioned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """How good a model is on dev: by ROUGE-L where it was generated, else by loss.

    Attributes:
        loss: nats per response token.
        rouge_l: 0 to 100, or None.
        accuracy: share of the response tokens that were its first choice; ranks nothing.
    """

    loss: float
    rouge_l: float | None = None
    accuracy: float | None = None

    @property
    def rank(self) -> float:
        """Larger is better; a loss that is not a number is worst."""
        if self.rouge_l is not None:
            return self.rouge_l
        return -math.inf if math.isnan(self.loss) else -self.loss

    @property
    def metrics(self) -> dict[str, float]:
        """What there is, by the name that a reader knows."""
        return {"loss": self.loss} | ({} if self.rouge_l is None else {"ROUGE-L": self.rouge_l})

    def folder_name(self, epoch: int, step: int) -> str:
        """The published form, epochA_stepB_lossX_rougelY."""
        rouge = "" if self.rouge_l is None else f"_rougel{self.rouge_l:.4f}"
        return f"epoch{epoch}_step{step}_loss{self.loss:.4f}{rouge}"


_FOLDER_NAME = re.compile(r"epoch\d+_step\d+_loss[^_]+(_rougel[^_]+)?")


@dataclass
class BestCheckpoints:
    """Keeps the `keep` best checkpoints under `folder`.

    A new one is written in full before a worse one goes, and the worse one goes only when `release` is called: after
    a resume state has been written that no longer counts on it. Every rank calls every method with the same
    arguments, for gathering the weights takes them all.

    Attributes:
        kept: (rank, folder name) of the best so far, the best first.
    """

    folder: Path
    keep: int
    writes_files: bool
    kept: list[tuple[float, str]] = field(default_factory=list)

    def offer(self, score: Score, epoch: int, step: int, save: Callable[[Path], None]) -> None:
        """Saves by `save(path)` if the score is among the best so far; of equals the earlier stays.

        Raises:
            StorageError: it cannot be written; the earlier ones are untouched.
        """
        name = score.folder_name(epoch, step)
        best = sorted([*self.kept, (score.rank, name)], key=lambda entry: entry[0], reverse=True)[:self.keep]
        if (score.rank, name) not in best:
            logger.info("checkpoint %s is not among the best %d; not kept", name, self.keep)
            return
        path = self.folder / name
        with writing(path):
            save(unfinished(path))
            if self.writes_files:
                publish(path)
                logger.info("saved checkpoint %s", path)
        self.kept = best

    def release(self) -> None:
        """Removes every checkpoint that is not among the best, and what an interrupted run left half-made."""
        if not self.writes_files:
            return
        sweep(self.folder)
        names = {name for _, name in self.kept}
        for path in self.folder.glob("epoch*"):
            if _FOLDER_NAME.fullmatch(path.name) and path.name not in names:
                discard(path)


def save_model(model: nn.Module, tokenizer: Tokenizer, folder: Path, card: str, writes_files: bool) -> None:
    """Writes weights (safetensors), configuration, generation settings, tokenizer and model card.

    The model may be a full one or one with a LoRA adapter, of which the adapter is written alone.
    """
    weights = gather_weights(model, keep=writes_files)
    if writes_files:
        folder.mkdir()
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")  # in place of peft's own


def gather_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The model's state dict; under ZeRO-3 each parameter is gathered on its own, so never all at once on a device.

    Every rank takes part; those without `keep` get an empty dict.
    """
    if not is_partitioned(model):
        return model.state_dict() if keep else {}
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                weights[name] = parameter.detach().cpu().clone()
    return weights
