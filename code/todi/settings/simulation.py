"""The settings of a simulation: machines that a run is not on, and what is assumed of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from todi.options import option
from todi.settings.published import TRAINING_OPTIONS
from todi.settings.training import TrainConfig


@dataclass(frozen=True)
class ClusterConfig:
    """Machines that a run is simulated on. Without --gpus the doctor looks at a run on this one."""

    nodes: int | None = option(None, "simulate a run on so many machines; 1 where --gpus alone is given", least=1,
                               env=())
    gpus: int | None = option(None, "GPUs of each of them", least=1, env=())
    gpu: str = option("H100", "what the GPUs are, as in todi/runtime/peaks.py", env=())
    assumed_mfu: float = option(0.4, "assumed share of the GPUs' peak that the model's operations reach", above=0,
                                at_most=1, env=())
    network: float = option(50.0, "assumed GB a second that a machine sends to the others", above=0, env=())
    disk: float = option(1.0, "assumed GB a second that a process reads or writes", above=0, env=())
    train_samples: int | None = option(None, "training samples; counted in --data-dir when not given", least=1, env=())
    prompt_tokens: int | None = option(None, "tokens of every prompt; by --data-dir when not given", least=1, env=())
    response_tokens: int | None = option(None, "tokens of every response; by --data-dir when not given", least=1,
                                         env=())

    @property
    def wanted(self) -> bool:
        """Whether there is something to simulate."""
        return self.nodes is not None or self.gpus is not None

    @property
    def lengths(self) -> tuple[int | None, int | None, int | None]:
        """Samples, tokens of a prompt and of a response, as far as they are given."""
        return self.train_samples, self.prompt_tokens, self.response_tokens

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if self.nodes is not None and self.gpus is None:
            yield f"--nodes {self.nodes} needs --gpus, how many each of them has"
        if None in self.lengths and any(self.lengths):
            yield "--train-samples, --prompt-tokens and --response-tokens: give all three, or none and a --data-dir"


@dataclass(frozen=True)
class DoctorConfig:
    """Looks at a training run before it starts, on this machine or (--nodes, --gpus) on others by arithmetic."""

    cluster: ClusterConfig
    train: TrainConfig
    INSTEAD: ClassVar[Mapping[str, Any]] = TRAINING_OPTIONS
