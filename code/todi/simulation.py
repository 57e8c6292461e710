"""A run on machines that are not here, by arithmetic: memory, traffic, hours, and what the first rank does alone.

    python -m todi.doctor --nodes 4 --gpus 8 --gpu H100 --model-path STUDENT --teacher-model-path TEACHER ...

Of the models it reads the configurations, no weights. Nothing is run: every figure is an estimate. A table has a line
for each way to spread the run.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from todi.data.plans import Cost
from todi.data.tokenize import Example
from todi.models.backbone import backbone_and_head
from todi.models.inputs import ModelInputs
from todi.models.loading import empty_model
from todi.runtime.distributed import World
from todi.runtime.peaks import Board
from todi.settings import ClusterConfig, TrainConfig
from todi.training.deepspeed_config import build_deepspeed_config
from todi.training.estimate import estimate_memory, outline, samples_of, student_shape
from todi.training.forecast import Forecast, Pace, forecast
from todi.training.memory import Memory, Shape
from todi.training.rank_zero import Duty, duties
from todi.training.speed import forward_cost, training_cost
from todi.training.traffic import Collective, Links, host_bytes, step_traffic
from todi.training.train_inputs import TrainInputs, longest_sample

_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")
_DEV_SAMPLES = 500  # assumed where --dev-num is not given
# What stays in the computer's memory, by the least stage that can do so.
_OFFLOADS = {(): 0, ("optimizer",): 1, ("optimizer", "param"): 3}


@dataclass(frozen=True)
class Text:
    """What is trained on.

    Attributes:
        samples: how many there are.
        typical: some whose mean cost is that of all.
        extreme: some with the longest among them.
        source: where that is known from, in words.
    """

    samples: int
    typical: Sequence[Example]
    extreme: Sequence[Example]
    source: str


@dataclass(frozen=True)
class Variant:
    """A way to spread a run: what DeepSpeed is told, and whether the teachers are read from a cache."""

    deepspeed_config: dict[str, Any]
    offload: tuple[str, ...]
    cached: bool

    @property
    def zero(self) -> dict[str, Any]:
        """The section zero_optimization."""
        return self.deepspeed_config["zero_optimization"]

    @property
    def stage(self) -> int:
        """Of ZeRO, as it runs."""
        return self.zero["stage"]

    def __str__(self) -> str:
        return " + ".join([str(self.stage), *self.offload])


@dataclass(frozen=True)
class Simulation:
    """A run on a cluster.

    Attributes:
        board: what each GPU is.
    """

    config: TrainConfig
    cluster: ClusterConfig
    board: Board
    student: ModelInputs
    teachers: list[ModelInputs]
    text: Text

    @cached_property
    def world(self) -> World:
        """As its first rank sees it."""
        gpus = self.cluster.gpus
        return World(0, (self.cluster.nodes or 1) * gpus, 0, gpus)

    @cached_property
    def links(self) -> Links:
        return Links(self.cluster.nodes or 1, self.cluster.gpus, self.board.link, self.cluster.network * 1e9)

    @cached_property
    def shape(self) -> Shape:
        """Of the student. Its activations are those that autograd keeps on a CPU, whose attention keeps as little as a
        GPU's."""
        return student_shape(self.config, self._inputs({}), self.positions[1], _CPU)

    @property
    def positions(self) -> tuple[int, int]:
        """Of a micro-batch, at most: samples of a length."""
        length = longest_sample(self.config, self.text.extreme)[0] - 1
        return samples_of(self.config.optim, length), length

    @property
    def step_samples(self) -> int:
        return self.config.optim.step_samples(self.world.size)

    @property
    def steps(self) -> int:
        optim = self.config.optim
        return min(optim.max_steps or 2**62, -(-self.text.samples // self.step_samples) * optim.num_epochs)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each rank: packed, as few as hold its tokens."""
        optim = self.config.optim
        if optim.packing == "off":
            return optim.accumulation(self.world.size)
        tokens = sum(len(one.ids) - 1 for one in self.text.typical) / len(self.text.typical)
        most = optim.tokens(self.positions[1])
        return max(1, math.ceil(tokens * self.step_samples / (self.world.size * most)))

    @cached_property
    def variants(self) -> list[Variant]:
        """Every stage with every offload that it has, live teachers and cached ones; what a DeepSpeed file says is one
        way alone."""
        ways = [(stage, offload) for offload, least in _OFFLOADS.items() for stage in range(least, 4)]
        if self.config.run.deepspeed_config:
            ways = [(self.config.run.zero_stage, self.config.run.offload)]
        cached = (False, True) if self.teachers and not self.config.source.on_policy else (False,)
        built = {(config["zero_optimization"]["stage"], offload): config for stage, offload in sorted(ways)
                 for config in [self._deepspeed(stage, offload)]}  # in 16 bits stage 0 runs as 1
        return [Variant(config, offload, from_cache) for from_cache in cached
                for (_, offload), config in built.items()]

    def _deepspeed(self, stage: int, offload: Sequence[str]) -> dict[str, Any]:
        optim, run = self.config.optim, self.config.run
        return build_deepspeed_config(
            precision=self.student.precision, zero_stage=stage, batch_size=optim.batch_size,
            accumulation=optim.accumulation(self.world.size), clip_grad=optim.clip_grad, offload=offload,
            ranks=self.world.size, override_file=run.deepspeed_config)

    def _inputs(self, deepspeed_config: dict[str, Any]) -> TrainInputs:
        return TrainInputs(self.student, self.teachers, None, deepspeed_config, [], [], [], [], [], "")

    def memory(self, variant: Variant) -> Memory:
        """Of the fullest moment of a GPU."""
        return self._memory(variant, self.teacher_ranks(variant))

    def teacher_ranks(self, variant: Variant) -> int:
        """Over how many the weights of live teachers are spread: all, where they are to be, or do not fit whole."""
        wanted = self.config.teacher.teacher_zero
        if variant.cached or not self.teachers or wanted == "off":
            return 1
        fits = wanted == "auto" and self._memory(variant, 1).total <= self.board.memory
        return 1 if fits else self.world.size

    def _memory(self, variant: Variant, teacher_ranks: int) -> Memory:
        return estimate_memory(self.config, self._inputs(variant.deepspeed_config), self.shape, self.text.extreme,
                               self.world, _CUDA, [variant.cached] * len(self.teachers), teacher_ranks)

    def traffic(self, variant: Variant) -> list[Collective]:
        """Of a step."""
        found = step_traffic(self.shape, variant.zero, self.micro_batches)
        if self.teacher_ranks(variant) > 1:
            weights = sum(number_of(backbone) * one.precision.dtype.itemsize
                          for one, (backbone, _) in zip(self.teachers, self._teacher_parts, strict=True))
            found.append(Collective("all-gather", "weights of teachers", weights * self.micro_batches, overlapped=True))
        return found

    def to_host(self, variant: Variant) -> int:
        """Bytes between a GPU and the computer's memory in a step."""
        return host_bytes(self.shape, variant.zero, self.micro_batches, self.world.size)

    def forecast(self, variant: Variant) -> Forecast:
        """Of the steps of the run."""
        return forecast(self.steps, self._operations(self._step_cost(variant.cached), self.step_samples),
                        self.traffic(variant), self.to_host(variant), self.pace)

    @cached_property
    def pace(self) -> Pace:
        peak = self.board.peak(self.student.precision.dtype)
        return Pace(peak.flops, self.cluster.assumed_mfu, self.links, self.board.host)

    def filling(self) -> float:
        """Hours of the teachers' pass over all samples that fills a cache, shared over the ranks."""
        cost = sum((forward_cost(*parts) for parts in self._teacher_parts), Cost())
        return self.pace.computing(self._operations(dataclasses.replace(cost, row=0), self.text.samples)) / 3600

    def cache_size(self) -> int:
        """Bytes of the hidden states of all labelled rows."""
        rows = sum(one.response_tokens for one in self.text.typical) * self.text.samples // len(self.text.typical)
        return sum(rows * one.config.hidden_size * one.precision.dtype.itemsize for one in self.teachers)

    def duties(self, variant: Variant) -> list[Duty]:
        """Of the first rank."""
        responses = (self.config.data.dev_num or _DEV_SAMPLES) * self.config.run.eval_gen_repeat_times
        return duties(self.shape, self.teacher_bytes, stage=variant.stage, ranks=self.world.size,
                      dev_responses=responses, disk=self.cluster.disk * 1e9)

    @cached_property
    def teacher_bytes(self) -> list[int]:
        """Of the weights of each teacher."""
        return [number_of(model) * one.precision.dtype.itemsize
                for one, model in zip(self.teachers, self._teacher_models, strict=True)]

    @cached_property
    def _teacher_models(self) -> list[nn.Module]:
        return [empty_model(one.config, self.config.student.trust_remote_code) for one in self.teachers]

    @cached_property
    def _teacher_parts(self) -> list[tuple]:
        return [backbone_and_head(model) for model in self._teacher_models]

    @cached_property
    def _student_cost(self) -> Cost:
        return training_cost(*backbone_and_head(outline(self.config.student, self.student)))

    def _step_cost(self, cached: bool) -> Cost:
        """Of training; of cached teachers the head alone works."""
        return sum((forward_cost(None if cached else backbone, head) for backbone, head in self._teacher_parts),
                   self._student_cost)

    def _operations(self, cost: Cost, samples: int) -> float:
        return cost.of(self.text.typical) * samples / len(self.text.typical)


def number_of(module: nn.Module) -> int:
    """Of its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
