"""Samples whose responses the student writes itself, in rounds: on-policy distillation (docs/on-policy.md)."""

import dataclasses
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from todi.data.plans import StepPlan
from todi.data.sample_sources import EpochSource
from todi.data.tokenize import Example
from todi.generation.decoding import Response
from todi.generation.sampling import stream_key
from todi.training.mixtures import Mixture
from todi.training.speed import Meter
from todi.training.state import KEPT_STATES

logger = logging.getLogger(__name__)

_REPEATED = 4  # tokens of the n-grams whose repetition is reported


@dataclass(frozen=True)
class Text:
    """A response that the student wrote.

    Attributes:
        example: with its prompt; closed by its end (EOS) unless it was cut off. Its number is the run's own.
        step: optimizer steps that the student had done.
        cut: whether the length limit cut it off.
    """

    example: Example
    step: int
    cut: bool

    @property
    def response(self) -> tuple[int, ...]:
        """Token ids, with the end."""
        return self.example.ids[self.example.prompt_length:]

    def to_json(self) -> dict[str, Any]:
        """Token ids in a string, since a state is written a value a line."""
        return {"ids": " ".join(map(str, self.example.ids)), "prompt": self.example.prompt_length,
                "number": self.example.sample_id, "step": self.step, "cut": self.cut}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Text":
        ids = tuple(map(int, fields["ids"].split()))
        return cls(Example(ids, fields["prompt"], fields["number"], own=True), fields["step"], fields["cut"])


@dataclass(frozen=True)
class Round:
    """What some steps are trained on.

    Attributes:
        first, end: numbers of its steps in the run, counted from 0, the end not among them.
        texts: by the place of the sample in the order of its epoch; the others have the response of the data.
    """

    first: int = 0
    end: int = 0
    texts: Mapping[int, Text] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Rounds:
    """How a run is cut into rounds, and what these are made of.

    Attributes:
        steps: of a round; one ends with the epoch at the latest.
        total_steps: of the run; nothing is written for later ones.
        replay_size: texts that are kept to come again.
        paired: whether a sample that the student answers keeps the response of the data as well: it comes with both
            in one step.
    """

    steps: int
    total_steps: int
    seed: int
    replay_size: int = 0
    paired: bool = False


class Reader(Protocol):
    """Reads the samples of a round when it begins, so that it need not when they are trained on: a `RoundTeacher`."""

    def read(self, number: int, samples: Sequence[Example]) -> None:
        """Samples of the round that began at step `number`, unless it knows what it read of them."""

    def forget_before(self, number: int) -> None:
        """Says that no sample of a round before `number` comes again."""


class StudentSource:
    """A `SampleSource`: the samples of another, some of them with a response that the student writes.

    When a round begins the student answers the prompts of all steps of the round that are its own to answer. Whose they
    are, and what random numbers it writes with, follows from the seed and from the place in the epoch; so a run that
    goes on in the middle of a round, whose texts are in the state, goes on exactly.

    Args:
        base: whose prompts are answered, and in what order.
        write: has the student answer prompts, given the keys of their random streams; on every rank alike.
        ends: the token that closes the response of each sample, by its number.
        mixture: says how many samples the student answers.
        reader: reads the samples of every round.
        tell: is told of every round, with the number of steps done.
        meter: is told when the student writes.
    """

    def __init__(self, base: EpochSource, write: Callable[[Sequence[Sequence[int]], Sequence[int]], list[Response]],
                 ends: Sequence[int], mixture: Mixture, rounds: Rounds, *, reader: Reader | None = None,
                 tell: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
                 meter: Meter | None = None):
        self.base = base
        self.write = write
        self.ends = ends
        self.mixture = mixture
        self.rounds = rounds
        self.reader = reader
        self.tell = tell
        self.meter = meter or Meter()
        self.round = Round()
        self.written = 0
        self.latest: deque[Text] = deque(maxlen=rounds.replay_size)
        self._unread = False  # whether the reader has not heard of the round
        self._oldest: deque[int] = deque(maxlen=KEPT_STATES)  # of the texts of each kept state, the first round

    @property
    def steps_per_epoch(self) -> int:
        return self.base.steps_per_epoch

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        """See `SampleSource`; the last plan of a round says that the one after it has to wait for the student."""
        order, before = self.base.order(epoch), (epoch - 1) * self.steps_per_epoch
        end = min(before + self.steps_per_epoch, self.rounds.total_steps)
        for step in range(before + first_step, end):
            if not self.round.first <= step < self.round.end:
                self._begin_round(order, step, min(step + self.rounds.steps, end), before, epoch)
            if self._unread:
                self._have_it_read(order, before)
            places = self._places(order, step - before, step - before + 1)
            plan = self.base.shape.cut([example for place in places for example in self._at(order, place)])
            yield dataclasses.replace(plan, closes_round=step + 1 == self.round.end)

    def _places(self, order: Sequence[Example], first: int, end: int) -> range:
        """Of the samples of some steps of an epoch, in its order."""
        size = self.base.shape.samples
        return range(first * size, min(end * size, len(order)))

    def _begin_round(self, order: Sequence[Example], first: int, end: int, before: int, epoch: int) -> None:
        size, started = self.base.shape.samples, time.perf_counter()
        places = self._places(order, first - before, end - before)
        share, replayed = self.mixture.shares(first / self.rounds.total_steps)
        drawn = random.Random(f"round {self.rounds.seed} {first}")
        own = [place for place in places if drawn.random() < share]
        again = {place for place in own if drawn.random() < replayed and len(self.latest) == self.latest.maxlen}
        new = [place for place in own if place not in again]
        with self.meter.phase("generation"):
            responses = self.write([order[place].prompt for place in new],
                                   [stream_key("student", self.rounds.seed, epoch, place) for place in new])
        texts = dict(zip(new, (self._text(order[place], response, first)
                               for place, response in zip(new, responses, strict=True)), strict=True))
        texts |= {place: drawn.choice(self.latest) for place in again}
        self.round, self._unread = Round(first, end, texts), True
        if own:
            seconds = time.perf_counter() - started
            self._report([texts[place] for place in new], len(again), len(places), seconds,
                         [first + (place - places.start) // size - texts[place].step for place in own])
        self.latest.extend(texts[place] for place in new)

    def _at(self, order: Sequence[Example], place: int) -> list[Example]:
        """What is trained on at a place of an epoch."""
        if place not in self.round.texts:
            return [order[place]]
        own = self.round.texts[place].example
        return [order[place], own] if self.rounds.paired else [own]

    def _have_it_read(self, order: Sequence[Example], before: int) -> None:
        """Tells the reader of the samples of the round, but for the texts of earlier ones; `before` is their epoch."""
        self._unread = False
        if self.reader:
            first, texts = self.round.first, self.round.texts
            places = self._places(order, first - before, self.round.end - before)
            with self.meter.phase("teacher"):
                self.reader.read(first, [example for place in places for example in self._at(order, place)
                                         if not example.own or texts[place].step == first])

    def _text(self, asked: Example, response: Response, step: int) -> Text:
        end = () if response.cut else (self.ends[asked.sample_id],)
        number = len(self.ends) + self.written
        self.written += 1
        return Text(Example((*asked.prompt, *response.ids, *end), asked.prompt_length, number, own=True), step,
                    response.cut)

    def _report(self, new: Sequence[Text], replayed: int, samples: int, seconds: float, lags: Sequence[int]) -> None:
        lengths = [len(text.response) for text in new]
        values = {"samples": samples, "written": len(new), "replayed": replayed, "lag": sum(lags) / len(lags)}
        if new:
            empty = sum(not text.cut and len(text.response) == 1 for text in new)
            values |= {"response_tokens": sum(lengths) / len(new), "empty_share": empty / len(new),
                       "cut_share": sum(text.cut for text in new) / len(new),
                       "repetition": repetition([text.response for text in new]),
                       "tokens_per_second": sum(lengths) / seconds}
            logger.info("the student has written %d responses of %.0f tokens, %.0f %% of them cut off, at %.0f "
                        "tokens/s", len(new), values["response_tokens"], 100 * values["cut_share"],
                        values["tokens_per_second"])
        self.tell(self.round.first, values | {"seconds": seconds})

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.mixture.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """See `SampleSource`; the reader may forget what none of the states has that are kept by now."""
        if self.reader and len(self._oldest) == KEPT_STATES:
            self.reader.forget_before(self._oldest[0])
        self._oldest.append(self._first_round())
        return {"first": self.round.first, "end": self.round.end, "written": self.written,
                "texts": [[place, text.to_json()] for place, text in self.round.texts.items()],
                "latest": [text.to_json() for text in self.latest], "mixture": self.mixture.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `SampleSource`; the reader reads what it no longer has of the texts that may come again."""
        if not state:  # of a run that was none of the student's texts, until now
            return
        texts = {place: Text.from_json(fields) for place, fields in state["texts"]}
        self.round, self.written = Round(state["first"], state["end"], texts), state["written"]
        self.latest.clear()
        self.latest.extend(map(Text.from_json, state["latest"]))
        self.mixture.load_state_dict(state["mixture"])
        self._unread = True
        self._oldest.extend([self._first_round()] * KEPT_STATES)
        if self.reader:
            own = sorted({text.example.sample_id: text for text in self._texts()}.values(), key=lambda text: text.step)
            for step, texts in groupby(own, key=lambda text: text.step):
                self.reader.read(step, [text.example for text in texts])

    def _texts(self) -> list[Text]:
        """All that may be trained on."""
        return [*self.latest, *self.round.texts.values()]

    def _first_round(self) -> int:
        """The step at which the oldest of these was written."""
        return min([self.round.first, *(text.step for text in self._texts())])


def repetition(responses: Sequence[Sequence[int]]) -> float:
    """Of all runs of four tokens in the responses, the share that has occurred in the same response before."""
    runs = [[tuple(ids[i:i + _REPEATED]) for i in range(len(ids) - _REPEATED + 1)] for ids in responses]
    return 1 - sum(len(set(of_one)) for of_one in runs) / max(1, sum(map(len, runs))) if any(runs) else 0.0
