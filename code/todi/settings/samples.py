"""The settings of where a training run's text comes from."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from todi.options import option

DATASET = "dataset"
SAMPLES = (DATASET, "student", "mixed", "adaptive", "paired")


@dataclass(frozen=True)
class SamplesConfig:
    """Whose responses are trained on: those of the data, or what the student writes."""

    samples: str = option(DATASET, "whose responses are trained on: the data's (dataset), the student's own to the "
                                   "data's prompts (student), one of them (mixed), one by DistiLLM's schedule "
                                   "(adaptive), both side by side (paired)",
                          choices=SAMPLES)
    student_share: float = option(0.5, "mixed: share of the samples whose response the student writes; GKD's lambda",
                                  above=0, below=1)
    round_steps: int = option(8, "optimizer steps that are trained on what the student wrote in one go; 1 is strictly "
                                 "on-policy", least=1)
    replay: float = option(0.0, "share of the student's samples that are taken from its latest --replay-size texts "
                                "instead of written anew, once there are as many", least=0, below=1)
    replay_size: int = option(1000, "texts of the student that are kept for that", least=1)
    student_kd_objective: str | None = option(None, "the divergence on what the student writes, where it is another "
                                                    "than --kd-objective", env="STUDENT_KD_OBJ")
    student_kd_params: tuple[str, ...] = option((), "its parameters as name=value")
    sample_tokens: int = option(256, "most tokens of a response that the student writes", least=1)
    sample_batch_size: int = option(0, "prompts that the student answers together, on each device; 0: as many as 4 GiB "
                                       "of keys and values hold, at most 256", least=0)
    sample_temperature: float = option(1.0, "temperature of the student's writing", above=0)
    sample_top_p: float = option(1.0, "it writes with the smallest set of tokens whose probability is at least this",
                                 above=0, at_most=1)
    sample_top_k: int = option(0, "it writes with so many of the most likely tokens; 0 is all", least=0)

    @property
    def on_policy(self) -> bool:
        """Whether the student writes."""
        return self.samples in SAMPLES[1:]

    @property
    def paired(self) -> bool:
        """Whether a prompt comes with both responses."""
        return self.samples == "paired"

    @property
    def replays(self) -> bool:
        """Whether what it wrote comes again."""
        return self.replay > 0 or self.samples == "adaptive"

    @property
    def data_share(self) -> float:
        """Of the data's samples the share that keeps its response, in the mean; at first, where that adapts."""
        return {"student": 0, "mixed": 1 - self.student_share}.get(self.samples, 1)

    @property
    def uses_responses(self) -> bool:
        """Whether those of the data are trained on."""
        return self.data_share > 0

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        for field in dataclasses.fields(self):
            given = getattr(self, field.name) != field.default
            if field.name != "samples" and given and not self.on_policy:
                yield f"--{field.name.replace('_', '-')} needs --samples {', '.join(SAMPLES[1:-1])} or {SAMPLES[-1]}"
        if self.student_share != 0.5 and self.on_policy and self.samples != "mixed":
            yield "--student-share needs --samples mixed"
        if self.student_kd_params and not self.student_kd_objective:
            yield "--student-kd-params needs --student-kd-objective"
        if self.replay and self.samples in ("adaptive", "paired"):
            why = {"adaptive": "replays more and more by itself", "paired": "has a new response to each prompt"}
            yield f"--replay needs --samples student or mixed: {self.samples} {why[self.samples]}"
