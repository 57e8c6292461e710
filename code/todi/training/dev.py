"""How good the student is on dev: cross-entropy, and ROUGE-L of what it writes."""

from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion, LossSums
from todi.data.batches import collate
from todi.data.records import Record
from todi.data.tokenize import Example
from todi.evaluation.rouge import rouge_l
from todi.generation.decoding import Decoding, generate, stop_ids, to_texts
from todi.generation.sampling import stream_key
from todi.runtime.distributed import World
from todi.training.student import is_partitioned


@dataclass(frozen=True)
class DevSet:
    """What a checkpoint is judged on.

    Attributes:
        examples: for the loss.
        prompts: token ids of each prompt, for ROUGE-L.
        decoding: None ranks checkpoints by the loss and generates nothing.
        batch_size: samples or prompts at a time, per device.
        seed: of the sampling.
    """

    records: Sequence[Record]
    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    decoding: Decoding | None
    batch_size: int
    seed: int


@torch.no_grad()
def dev_loss(engine: deepspeed.DeepSpeedEngine, dev: DevSet, pad_id: int, world: World) -> LossSums:
    """Means per response token of cross-entropy and accuracy; each rank takes its share of the samples.

    It is the cross-entropy whatever the student is trained on, so that objectives can be compared.
    """
    cross_entropy = DistillationCriterion()
    order = sorted(dev.examples, key=lambda example: len(example.ids))
    sums = torch.zeros(len(LossSums._fields), device=engine.device)
    for start in range(0, len(order), dev.batch_size * world.size):
        mine = order[start:start + dev.batch_size * world.size][world.rank::world.size]
        batch = collate(mine, pad_id).to(engine.device)
        sums += torch.stack(engine(batch, cross_entropy)[0])
    return means(world.sum(sums))


def dev_rouge_l(model: torch.nn.Module, dev: DevSet, tokenizer: Tokenizer, world: World) -> float:
    """Mean ROUGE-L, 0 to 100, of one response per dev prompt.

    Each rank takes its share of the prompts, unless ZeRO-3 has spread the weights: then every forward needs every
    rank, and all of them write the same responses in step.
    """
    stride, first = (1, 0) if is_partitioned(model) else (world.size, world.rank)
    mine = range(first, len(dev.prompts), stride)
    responses = generate(model, [dev.prompts[i] for i in mine], [stream_key("dev", dev.seed, i) for i in mine],
                         decoding=dev.decoding, eos_ids=stop_ids(model, tokenizer, dev.records),
                         pad_id=tokenizer.pad_token_id, batch_size=dev.batch_size)
    scores = rouge_l(to_texts(responses, tokenizer), [dev.records[i].references for i in mine])
    everyone = [score for part in world.gather(scores) for score in part]
    return sum(everyone) / len(everyone)


def means(sums: torch.Tensor) -> LossSums:
    """Sums (5,) over tokens -> means per token, as floats; the only division there is."""
    *values, tokens = sums.tolist()
    return LossSums(*(value / max(tokens, 1) for value in values), tokens)
