"""The best N models of a run, each in a folder that transformers loads directly."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.engine.student import is_partitioned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """How good a model is on dev: by ROUGE-L where it was generated, else by loss.

    Attributes:
        loss: nats per response token.
        rouge_l: 0 to 100, or None.
    """

    loss: float
    rouge_l: float | None = None

    @property
    def rank(self) -> float:
        """Larger is better."""
        return -self.loss if self.rouge_l is None else self.rouge_l

    def folder_name(self, epoch: int, step: int) -> str:
        """The published form, epochA_stepB_lossX_rougelY."""
        rouge = "" if self.rouge_l is None else f"_rougel{self.rouge_l:.4f}"
        return f"epoch{epoch}_step{step}_loss{self.loss:.4f}{rouge}"


@dataclass
class BestCheckpoints:
    """Keeps the `keep` best checkpoints under `folder`.

    A new one is written in full before a worse one goes, under a name that is no checkpoint's until it is complete.
    Every rank calls `offer` with the same arguments, for gathering the weights takes them all.
    """

    folder: Path
    keep: int
    writes_files: bool
    kept: list[tuple[float, str]] = field(default_factory=list)

    def offer(self, score: Score, epoch: int, step: int, save: Callable[[Path], None]) -> None:
        """Saves by `save(path)` if the score is among the best so far; of equals the earlier stays."""
        name = score.folder_name(epoch, step)
        ranking = sorted([*self.kept, (score.rank, name)], key=lambda entry: entry[0], reverse=True)
        self.kept, dropped = ranking[:self.keep], ranking[self.keep:]
        if any(entry[1] == name for entry in dropped):
            logger.info("checkpoint %s is not among the best %d; not kept", name, self.keep)
            return
        unfinished = self.folder / f".{name}.unfinished"
        save(unfinished)
        if self.writes_files:
            unfinished.rename(self.folder / name)
            for _, worse in dropped:
                shutil.rmtree(self.folder / worse)
            logger.info("saved checkpoint %s", self.folder / name)


def save_model(model: nn.Module, tokenizer: Tokenizer, folder: Path, writes_files: bool) -> None:
    """Writes weights (safetensors), configuration, generation settings and tokenizer of a full or LoRA model."""
    weights = gather_weights(model, keep=writes_files)
    if writes_files:
        folder.mkdir(parents=True)
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


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
