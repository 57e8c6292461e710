"""How good the student is on dev: cross-entropy, and ROUGE-L of what it writes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion
from todi.data.batches import Collate
from todi.data.records import Record
from todi.data.tokenize import Example
from todi.evaluation.rouge import rouge_l
from todi.evaluation.rouge_tokens import choose_tokenizer
from todi.generation.decoding import Decoding, Response, generate, stop_ids, to_texts
from todi.generation.sampling import stream_key
from todi.models.compiling import uncompiled
from todi.runtime.distributed import World
from todi.runtime.signals import Interrupted
from todi.runtime.whereabouts import HERE
from todi.settings import AUTO_TOKENIZER
from todi.training.own_pace import OwnPace
from todi.training.scores import Score
from todi.training.step import add, means

logger = logging.getLogger(__name__)

_LOSS_BATCH = 32  # most whole samples at a time on each device


class Judge(Protocol):
    """Says how good the student is. Every rank has one, and calls it in step with the others."""

    def __call__(self, engine: deepspeed.DeepSpeedEngine, asked: Callable[[], int]) -> Score:
        """The score. `asked` gives the number of a signal that asks to stop, else 0; then Interrupted is raised."""


@dataclass(frozen=True)
class DevSet:
    """What a checkpoint is judged on; a `Judge`.

    Attributes:
        examples: for the loss.
        prompts: token ids of each prompt, for ROUGE-L.
        decoding: None ranks checkpoints by the loss and generates nothing.
        batch_size: most prompts answered together, per device.
        collate: makes the batch of some examples.
        seed: of the sampling.
        rouge_tokenizer: one of `ROUGE_TOKENIZERS`; auto chooses by the references of all records.
        samples: responses to each prompt.
        room: bytes of keys and values while a batch of responses is written.
    """

    records: Sequence[Record]
    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    tokenizer: Tokenizer
    decoding: Decoding | None
    batch_size: int
    seed: int
    world: World
    collate: Collate
    rouge_tokenizer: str = AUTO_TOKENIZER
    samples: int = 1
    room: int = 0

    def __call__(self, engine: deepspeed.DeepSpeedEngine, asked: Callable[[], int] = lambda: 0) -> Score:
        model = engine.module.model
        with uncompiled(model):
            mean = self.loss(engine)
        rouge = self.rouge_l(model, asked) if self.decoding else None
        if rouge == 0 and self.world.is_main:
            logger.warning("warning: ROUGE-L is 0 for every dev response; while it is, the loss ranks the checkpoints")
        return Score(mean["ce"], rouge, mean["correct"])

    @torch.no_grad()
    def loss(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Means per response token of cross-entropy and accuracy; each rank takes its share of the samples.

        It is the cross-entropy whatever the student is trained on, so that objectives can be compared.
        """
        cross_entropy, rank, ranks = DistillationCriterion(), self.world.rank, self.world.size
        size = min(self.batch_size, _LOSS_BATCH) * ranks
        order, sums = sorted(self.examples, key=lambda example: len(example.ids)), {}
        for start in range(0, len(order), size):
            mine = order[start:start + size][rank::ranks]
            batch = self.collate(mine).to(engine.device)
            sums = add(sums, engine(batch, cross_entropy)[0])
            HERE.tick()
        return means(sums, self.world)

    def rouge_l(self, model: nn.Module, asked: Callable[[], int] = lambda: 0) -> float:
        """Mean ROUGE-L, 0 to 100, of `samples` responses to each dev prompt.

        Each rank takes its share of the prompts.

        Args:
            asked: after each token; the number of a signal to stop for, else 0.

        Raises:
            Interrupted: on every rank, where one of them has stopped.
        """
        share = range(self.world.rank, len(self.prompts), self.world.size)
        streams = {stream_key("dev", self.seed, i, *([sample] if sample else [])): i
                   for i in share for sample in range(self.samples)}
        responses, stop = self._write(model, streams, asked)
        references = [] if stop else [self.records[i].references for i in streams.values()]
        scores = rouge_l(to_texts(responses, self.tokenizer), references, self._rouge_tokens)
        everywhere = self.world.gather((scores, stop))
        if stop := max(stop for _, stop in everywhere):
            raise Interrupted(stop)
        everyone = [score for part, _ in everywhere for score in part]
        return sum(everyone) / len(everyone)

    def _write(self, model: nn.Module, streams: Mapping[int, int],
               asked: Callable[[], int]) -> tuple[list[Response], int]:
        """This rank's responses, and 0; or none, and the signal that it has stopped for.

        Args:
            streams: the prompt of each response, by the key of its random stream.
        """
        stop = 0

        def heed(finished: int) -> None:
            nonlocal stop
            stop = asked()
            if stop:
                raise Interrupted(stop)

        # within the pace, which waits for the other ranks: they may not have been asked
        with self._pace(model), suppress(Interrupted):
            return generate(model, [self.prompts[i] for i in streams.values()], list(streams), decoding=self.decoding,
                            eos_ids=stop_ids(model, self.tokenizer, self.records), pad_id=self.tokenizer.pad_token_id,
                            batch_size=self.batch_size, progress=heed), 0
        return [], stop

    @cached_property
    def _pace(self) -> OwnPace:
        """For a model whose weights ZeRO-3 has spread."""
        return OwnPace(self.world, self.room)

    @cached_property
    def _rouge_tokens(self) -> str:
        return choose_tokenizer(self.rouge_tokenizer, [record.references for record in self.records], "dev")
