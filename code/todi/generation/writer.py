"""Responses to many prompts with several seeds, over one or several ranks, in batches that can be gone on with."""

import sys
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.generation.decoding import Decoding, Response, generate
from todi.generation.sampling import stream_key
from todi.runtime.distributed import World

Row = tuple[int, int]  # seed, index of the record
# Batches of a round on each rank, and most rows of several: there are to be some to take the places of those that end,
# and an interruption is to cost little.
_BATCHES, _ROWS = 4, 512


class Layout(NamedTuple):
    """How prompts were decoded together: so many at a time on each of so many processes."""

    batch_size: int
    processes: int

    def __str__(self) -> str:
        return f"batches of {self.batch_size} on {self.processes} process{'es' * (self.processes > 1)}"


@dataclass(frozen=True)
class Writer:
    """Writes responses with one model. Every rank has one, and calls its methods in step with the others.

    Attributes:
        batch_size: most responses that a rank writes together; others take the places of those that end.
        pace: makes a block in which each rank may call the model as often as it likes, which ZeRO-3 has to provide for.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    decoding: Decoding
    batch_size: int
    world: World
    pace: Callable[[PreTrainedModel], AbstractContextManager[object]] = nullcontext

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], eos_ids: Collection[int],
              progress: Callable[[int], object] = lambda finished: None) -> list[Response]:
        """A response to each prompt by the random stream of its key; each rank writes its share, and has all of them.

        Args:
            progress: called with the number of responses that have been finished since the last call.
        """
        shares = dealt(prompts, self.world.size)
        mine = shares[self.world.rank]
        with self.pace(self.model):
            responses = generate(self.model, [prompts[place] for place in mine], [keys[place] for place in mine],
                                 decoding=self.decoding, eos_ids=eos_ids, pad_id=self.tokenizer.pad_token_id,
                                 batch_size=self.batch_size, progress=progress)
        progress(len(prompts) - len(responses))
        written = dict(zip(chain(*shares), chain(*self.world.gather(responses)), strict=True))
        return [written[place] for place in range(len(prompts))]

    def rounds(self, set_name: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int], written: Container[Row],
               eos_ids: Collection[int], progress: Callable[[int], object]) -> Iterator[dict[Row, Response]]:
        """Writes a response to each prompt with each seed, but for those that are `written`.

        In a round each rank has the rows of a few batches. What a round is follows from batch size and ranks alone: one
        that goes on has the same.

        Args:
            set_name: part of the name of each random stream.
            progress: called with the number of responses that have been finished since the last call.

        Yields:
            the responses of a round, those of all ranks on every rank.
        """
        # The longest first, so that memory runs out now or never; the seeds of a prompt together, for one prefill.
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]), reverse=True)
        rows = [(seed, index) for index in order for seed in seeds]
        size = max(self.batch_size, min(_BATCHES * self.batch_size, _ROWS)) * self.world.size
        for start in range(0, len(rows), size):
            rest = [row for row in rows[start:start + size] if row not in written]
            if rest:
                responses = self.write([prompts[index] for _, index in rest],
                                       [stream_key(set_name, seed, index) for seed, index in rest], eos_ids, progress)
                yield dict(zip(rest, responses, strict=True))


def dealt(prompts: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """Places of `prompts` for each rank: equal ones that follow one another go to one, which reads them once, unless
    others would have nothing to do; and the groups of them go around, so that ranks have as long ones."""
    most = -(-len(prompts) // ranks)
    equal = [list(group) for _, group in groupby(range(len(prompts)), key=lambda place: prompts[place])]
    groups = [group[start:start + most] for group in equal for start in range(0, len(group), most)]
    return [[place for group in groups[rank::ranks] for place in group] for rank in range(ranks)]


def progress_bar(total: int, written: int, world: World) -> tqdm:
    """Of `total` responses, of which some are written; the first rank shows it."""
    return tqdm(total=total, initial=written, unit="response", disable=not world.is_main,
                mininterval=0.5 if sys.stderr.isatty() else 10)
