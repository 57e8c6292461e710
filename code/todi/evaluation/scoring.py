"""From the records of a set to scored responses."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion
from todi.data.batches import collate
from todi.data.records import Record
from todi.data.tokenize import Example
from todi.evaluation.results import Generation
from todi.evaluation.rouge import exact_match, rouge_l
from todi.generation.decoding import Response, to_texts
from todi.generation.writer import Row, Writer
from todi.models.backbone import backbone_and_head, labelled_rows
from todi.models.packing import packing
from todi.runtime.whereabouts import HERE

_LOSS_BATCH = 8  # whole samples at a time; more of them bring more padding, and work enough is in these


@torch.no_grad()
def mean_loss(writer: Writer, examples: Sequence[Example]) -> float:
    """Mean cross-entropy of the writer's model over the response tokens of all `examples`; every rank calls it."""
    backbone, head = backbone_and_head(writer.model)
    order = sorted(examples, key=lambda example: len(example.ids))
    size = min(writer.batch_size, _LOSS_BATCH) * writer.world.size
    sums = torch.zeros(2, dtype=torch.float64)
    with packing(writer.model, "the model") as packed:
        for start in range(0, len(order), size):
            mine = order[start:start + size][writer.world.rank::writer.world.size]
            batch = collate(mine, writer.tokenizer.pad_token_id, packed).to(writer.model.device)
            hidden = labelled_rows(backbone, batch.inputs, batch.rows)
            found = DistillationCriterion()(hidden, head, batch.row_labels, None)
            sums += torch.stack([found["ce"], found["tokens"]]).cpu()
            HERE.tick()
    parts = writer.world.gather(sums.tolist())
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
