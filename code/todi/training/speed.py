"""How fast a run is: tokens a second, the share of the device's peak, and where the time goes (docs/performance.md)."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from todi.criterions import LinearHead
from todi.data.plans import Cost
from todi.data.tokenize import Example
from todi.runtime.distributed import World
from todi.runtime.peaks import Peak
from todi.runtime.stopwatch import Stopwatch
from todi.runtime.trace import StepTrace

logger = logging.getLogger(__name__)

T = TypeVar("T")

PHASES = ("data", "generation", "teacher", "student", "loss", "optimizer")
WAITING = "waiting"


def forward_cost(backbone: nn.Module | None, head: LinearHead) -> Cost:
    """Of a model's forward, or of its head alone, where there is no backbone."""
    row = 2 * _size(head.weight)
    if backbone is None:
        return Cost(row=row)
    return Cost(2 * sum(size for size, _ in _matrices(backbone)), row, _attention(backbone.config))


def training_cost(backbone: nn.Module, head: LinearHead) -> Cost:
    """Of forward and backward: for each weight of a product 6 operations a token where it is trained, 4 where frozen.

    Kaplan et al., 2020, section 2.1: forward, gradient of the input, gradient of the weight, 2 each. What gradient
    checkpointing computes again does not count.
    """
    token = sum((6 if trained else 4) * size for size, trained in _matrices(backbone))
    return Cost(token, (6 if head.weight.requires_grad else 4) * _size(head.weight), 3 * _attention(backbone.config))


def _matrices(backbone: nn.Module) -> Iterator[tuple[int, bool]]:
    """Of each parameter that a token is multiplied with: how many numbers of it, and whether it is trained.

    Tables that are looked up in are none. Of experts a token meets a few.
    """
    looked_up = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    config = backbone.config
    experts = next((getattr(config, name) for name in ("num_local_experts", "n_routed_experts", "num_experts")
                    if getattr(config, name, None)), 1)
    met = getattr(config, "num_experts_per_tok", None) or 1
    for name, parameter in backbone.named_parameters():
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in looked_up:
            size = _size(parameter)
            yield size * met // experts if ".experts." in name else size, parameter.requires_grad


def _size(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 has spread it over the ranks


def _attention(config: object) -> int:
    """Operations for each pair in a forward: a product for the score, one for the sum, in each head of each layer."""
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return 4 * config.num_hidden_layers * heads * width


class Meter:
    """Is told what a run does when. This one forgets it."""

    def add_cost(self, cost: Cost) -> None:
        """There is a model more whose work counts."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """What is done within the block belongs to a phase, one of `PHASES`."""
        return nullcontext()

    def each(self, name: str, things: Iterable[T]) -> Iterator[T]:
        """The things; getting each belongs to a phase."""
        return iter(things)

    def step(self) -> AbstractContextManager[None]:
        """Around an optimizer step."""
        return nullcontext()

    def count(self, examples: Sequence[Example], positions: int) -> None:
        """Notes a micro-batch.

        Args:
            positions: that are computed for it, padding included.
        """

    def report(self, seconds: float) -> dict[str, float]:
        """What there is to say of the last so many seconds; to be called by all ranks."""
        return {}

    def close(self) -> None:
        """Ends; says where the time of the whole run went."""


class SpeedMeter(Meter):
    """Measures.

    Args:
        peak: of the device of one rank; without it there is no share of it.
        trace: of a few steps, if one is wanted.
    """

    def __init__(self, stopwatch: Stopwatch, peak: Peak | None, world: World, device: torch.device,
                 trace: StepTrace | None = None):
        self.stopwatch = stopwatch
        self.cost = Cost()
        self.peak = peak
        self.world = world
        self.device = device
        self.trace = trace
        self.counts: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()  # seconds, and flops, since the start

    def add_cost(self, cost: Cost) -> None:
        self.cost += cost

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(name), self.stopwatch.phase(name):
            yield

    def each(self, name: str, things: Iterable[T]) -> Iterator[T]:
        things, end = iter(things), object()
        while True:
            with self.phase(name):
                thing = next(things, end)
            if thing is end:
                return
            yield thing

    def step(self) -> AbstractContextManager[None]:
        return self.trace.step() if self.trace else nullcontext()

    def count(self, examples: Sequence[Example], positions: int) -> None:
        self.counts.update(tokens=sum(len(example.ids) - 1 for example in examples), positions=positions,
                           flops=self.cost.of(examples))

    def report(self, seconds: float) -> dict[str, float]:
        """Tokens and positions a second over all ranks, the share of padding, that of the peak, and seconds by phase,
        of which a rank's mean is given: `waiting` is what is left."""
        names = ("tokens", "positions", "flops")
        mine = [*(self.counts[name] for name in names), *map(self.stopwatch.read().get, PHASES, [0.0] * len(PHASES))]
        self.counts.clear()
        everywhere = self.world.sum(torch.tensor(mine, dtype=torch.float64, device=self.device)).tolist()
        tokens, positions, flops = everywhere[:len(names)]
        phases = {name: value / self.world.size for name, value in zip(PHASES, everywhere[len(names):], strict=True)}
        phases[WAITING] = max(0.0, seconds - sum(phases.values()))
        self.totals.update(phases)
        return {"tokens_per_second": tokens / seconds, "positions_per_second": positions / seconds,
                "padding": 1 - tokens / max(positions, 1), **self._share_of_peak(flops, seconds),
                **{f"seconds_{name}": value for name, value in phases.items()}}

    def _share_of_peak(self, flops: float, seconds: float) -> dict[str, float]:
        return {"mfu": flops / seconds / (self.peak.flops * self.world.size)} if self.peak else {}

    def close(self) -> None:
        if self.trace:
            self.trace.close()
        if self.totals:
            logger.info("time: %s", shares(self.totals))


def in_words(speed: Mapping[str, float]) -> str:
    """Of a report what belongs in a line of the log, each followed by a comma."""
    if not speed:
        return ""
    peak = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
    return f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['padding']:.0%} padding{peak}, "


def shares(seconds: Mapping[str, float]) -> str:
    """Seconds by phase as shares of their sum, the largest first."""
    whole = sum(seconds.values())
    largest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in largest_first if value)
