"""From the records of a set to scored responses, over one or several ranks."""

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion
from todi.data.batches import collate
from todi.data.records import Record
from todi.data.tokenize import Example
from todi.evaluation.results import Generation
from todi.evaluation.rouge import exact_match, rouge_l
from todi.evaluation.set_files import Row
from todi.generation.decoding import Decoding, Response, generate, to_texts
from todi.generation.sampling import stream_key
from todi.models.backbone import backbone_and_head, labelled_rows
from todi.models.packing import packing
from todi.runtime.distributed import World

_LOSS_BATCH = 8  # whole samples at a time; more of them bring more padding, and work enough is in these


@dataclass(frozen=True)
class Writer:
    """Writes responses with one model. Every rank has one, and calls its methods in step with the others.

    Attributes:
        batch_size: most responses that a rank writes together.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    decoding: Decoding
    batch_size: int
    world: World

    def rounds(self, set_name: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int], written: Container[Row],
               eos_ids: Collection[int], progress: Callable[[int], object]) -> Iterator[dict[Row, Response]]:
        """Writes a response to each prompt with each seed, but for those that are `written`.

        In a round each rank has a batch, of prompts of about the same length, so that the ranks finish together.
        What a round is follows from batch size and ranks alone: one that goes on has the same batches.

        Args:
            set_name: part of the name of each random stream.
            progress: called with the number of responses that have been finished since the last call.

        Yields:
            the responses of a round, those of all ranks on every rank.
        """
        # The longest first, so that memory runs out now or never; the seeds of a prompt together, for one prefill.
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]), reverse=True)
        rows = [(seed, index) for index in order for seed in seeds]
        size = self.batch_size * self.world.size
        for start in range(0, len(rows), size):
            rest = [row for row in rows[start:start + size] if row not in written]
            if rest:
                yield self._round(set_name, prompts, rest, eos_ids, progress)

    def _round(self, set_name: str, prompts: Sequence[Sequence[int]], rows: Sequence[Row],
               eos_ids: Collection[int], progress: Callable[[int], object]) -> dict[Row, Response]:
        rank, ranks = self.world.rank, self.world.size
        mine = rows[len(rows) * rank // ranks:len(rows) * (rank + 1) // ranks]
        responses = generate(self.model, [prompts[index] for _, index in mine],
                             [stream_key(set_name, seed, index) for seed, index in mine], decoding=self.decoding,
                             eos_ids=eos_ids, pad_id=self.tokenizer.pad_token_id, batch_size=self.batch_size,
                             progress=progress)
        everyone = self.world.gather(list(zip(mine, responses, strict=True)))
        progress(len(rows) - len(mine))
        return {row: response for part in everyone for row, response in part}

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> float:
        """Mean cross-entropy over the response tokens of all `examples`."""
        backbone, head = backbone_and_head(self.model)
        order = sorted(examples, key=lambda example: len(example.ids))
        size = min(self.batch_size, _LOSS_BATCH) * self.world.size
        sums = torch.zeros(2, dtype=torch.float64)
        with packing(self.model, "the model") as packed:
            for start in range(0, len(order), size):
                mine = order[start:start + size][self.world.rank::self.world.size]
                batch = collate(mine, self.tokenizer.pad_token_id, packed).to(self.model.device)
                hidden = labelled_rows(backbone, batch.inputs, batch.rows)
                found = DistillationCriterion()(hidden, head, batch.row_labels, None)
                sums += torch.stack([found["ce"], found["tokens"]]).cpu()
        parts = self.world.gather(sums.tolist())
        ce, tokens = (sum(values) for values in zip(*parts, strict=True))
        return ce / max(tokens, 1)


def score(records: Sequence[Record], seeds: Sequence[int], responses: Mapping[Row, Response],
          tokenizer: Tokenizer, rouge_tokenizer: str) -> dict[int, list[Generation]]:
    """Scores a response to each record with each seed; by seed, in the order of the records."""
    rows = [(seed, index) for seed in seeds for index in range(len(records))]
    written = [responses[row] for row in rows]
    texts = to_texts(written, tokenizer)
    references = [records[index].references for _, index in rows]
    scores, matches = rouge_l(texts, references, rouge_tokenizer), exact_match(texts, references)
    by_seed: dict[int, list[Generation]] = {seed: [] for seed in seeds}
    for (seed, index), response, text, points, match in zip(rows, written, texts, scores, matches, strict=True):
        by_seed[seed].append(Generation(records[index].prompt, text, records[index].references, points, match,
                                        tokens=len(response.ids), cut=response.cut))
    return by_seed
