"""How good the student is on dev: cross-entropy, and ROUGE-L of what it writes."""

import logging
from collections.abc import Sequence
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
from todi.generation.decoding import Decoding, generate, stop_ids, to_texts
from todi.generation.sampling import stream_key
from todi.runtime.distributed import World
from todi.runtime.whereabouts import HERE
from todi.settings import AUTO_TOKENIZER
from todi.training.scores import Score
from todi.training.step import add, means
from todi.training.student import is_partitioned

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """Says how good the student is. Every rank has one, and calls it in step with the others."""

    def __call__(self, engine: deepspeed.DeepSpeedEngine) -> Score: ...


@dataclass(frozen=True)
class DevSet:
    """What a checkpoint is judged on; a `Judge`.

    Attributes:
        examples: for the loss.
        prompts: token ids of each prompt, for ROUGE-L.
        decoding: None ranks checkpoints by the loss and generates nothing.
        batch_size: samples or prompts at a time, per device.
        collate: makes the batch of some examples.
        seed: of the sampling.
        rouge_tokenizer: one of `ROUGE_TOKENIZERS`; auto chooses by the references of all records.
        samples: responses to each prompt.
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

    def __call__(self, engine: deepspeed.DeepSpeedEngine) -> Score:
        mean = self.loss(engine)
        rouge = self.rouge_l(engine.module.model) if self.decoding else None
        if rouge == 0 and self.world.is_main:
            logger.warning("warning: ROUGE-L is 0 for every dev response; while it is, the loss ranks the checkpoints")
        return Score(mean["ce"], rouge, mean["correct"])

    @torch.no_grad()
    def loss(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Means per response token of cross-entropy and accuracy; each rank takes its share of the samples.

        It is the cross-entropy whatever the student is trained on, so that objectives can be compared.
        """
        cross_entropy, rank, ranks = DistillationCriterion(), self.world.rank, self.world.size
        order, sums = sorted(self.examples, key=lambda example: len(example.ids)), {}
        for start in range(0, len(order), self.batch_size * ranks):
            mine = order[start:start + self.batch_size * ranks][rank::ranks]
            batch = self.collate(mine).to(engine.device)
            sums = add(sums, engine(batch, cross_entropy)[0])
            HERE.tick()
        return means(sums, self.world)

    def rouge_l(self, model: nn.Module) -> float:
        """Mean ROUGE-L, 0 to 100, of `samples` responses to each dev prompt.

        Each rank takes its share of the prompts, unless ZeRO-3 has spread the weights: then every forward needs every
        rank, and all of them write the same responses in step.
        """
        stride, first = (1, 0) if is_partitioned(model) else (self.world.size, self.world.rank)
        streams = {stream_key("dev", self.seed, i, *([sample] if sample else [])): i
                   for i in range(first, len(self.prompts), stride) for sample in range(self.samples)}
        mine = streams.values()
        responses = generate(model, [self.prompts[i] for i in mine], list(streams), decoding=self.decoding,
                             eos_ids=stop_ids(model, self.tokenizer, self.records),
                             pad_id=self.tokenizer.pad_token_id, batch_size=self.batch_size)
        scores = rouge_l(to_texts(responses, self.tokenizer), [self.records[i].references for i in mine],
                         self._rouge_tokens)
        everyone = [score for part in self.world.gather(scores) for score in part]
        return sum(everyone) / len(everyone)

    @cached_property
    def _rouge_tokens(self) -> str:
        return choose_tokenizer(self.rouge_tokenizer, [record.references for record in self.records], "dev")
