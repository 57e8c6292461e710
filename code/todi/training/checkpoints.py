"""The best N models of a run, each in a folder that transformers loads directly."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.runtime.storage import discard, publish, sweep, unfinished, writing
from todi.training.scores import Kept, Score
from todi.training.student import is_partitioned

logger = logging.getLogger(__name__)


@dataclass
class BestCheckpoints:
    """Keeps the `keep` best checkpoints under `folder`.

    A new one is written in full before a worse one goes, and the worse one goes only when `release` is called: after
    a resume state has been written that no longer counts on it. Every rank calls every method with the same
    arguments, for gathering the weights takes them all.

    Attributes:
        kept: the best so far, the best first.
    """

    folder: Path
    keep: int
    writes_files: bool
    kept: list[Kept] = field(default_factory=list)

    def offer(self, score: Score, epoch: int, step: int, save: Callable[[Path], None]) -> None:
        """Saves by `save(path)` if the score is among the best so far, in the order of `Kept`; says why, or why not.

        Raises:
            StorageError: it cannot be written; the earlier ones are untouched.
        """
        new = Kept(score.rank, score.folder_name(epoch, step), score.loss)
        ranked = sorted([*self.kept, new], key=lambda entry: entry.order, reverse=True)
        best, behind = ranked[:self.keep], ranked[self.keep:]
        if new in behind:
            logger.info("checkpoint %s is not kept: %s, the last of the best %d, has %s", new.name, best[-1].name,
                        self.keep, best[-1].advantage_over(new))
            return
        path = self.folder / new.name
        with writing(path):
            save(unfinished(path))
            if self.writes_files:
                publish(path)
        self.kept = best
        reason = (f"it has {new.advantage_over(behind[0])} than {behind[0].name}, which goes" if behind else
                  f"there were fewer than {self.keep}")
        logger.info("saved checkpoint %s: %s", path, reason)

    def release(self) -> None:
        """Removes every checkpoint that is not among the best, and what an interrupted run left half-made."""
        if not self.writes_files:
            return
        sweep(self.folder)
        names = {entry.name for entry in self.kept}
        for path in self.folder.glob("epoch*"):
            if path.name not in names and Kept.named(path.name):
                discard(path)


def save_model(model: nn.Module, tokenizer: Tokenizer, folder: Path, card: str, writes_files: bool) -> None:
    """Writes weights (safetensors), configuration, generation settings, tokenizer and model card.

    The model may be a full one or one with a LoRA adapter, of which the adapter is written alone.
    """
    weights = gather_weights(model, keep=writes_files)
    # peft would add the base's embeddings where they are adapted, which nobody has trained
    options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    if writes_files:
        folder.mkdir()
        model.save_pretrained(folder, state_dict=weights, **options)
        tokenizer.save_pretrained(folder)
        # in place of peft's own; a path need not be UTF-8
        (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def gather_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The model's state dict; under ZeRO-3 each parameter is gathered on its own, so never all at once on a device.

    One that has two names, as a head that is the embedding, is one tensor in it, so that it is written once. Every
    rank takes part; those without `keep` get an empty dict.
    """
    if not is_partitioned(model):
        return model.state_dict() if keep else {}
    whole = {}
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                whole[id(parameter)] = parameter.detach().cpu().clone()
    if not keep:
        return {}
    # what is no parameter is whole on each rank
    return {name: whole[id(one)] if isinstance(one, nn.Parameter) else one.detach()
            for name, one in model.state_dict(keep_vars=True).items()}
