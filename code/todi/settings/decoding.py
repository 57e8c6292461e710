"""How responses are written, in an evaluation and for training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from todi.options import option
from todi.settings.shared import max_length_option, max_prompt_length_option, response_problems


@dataclass(frozen=True)
class DecodingConfig:
    """How a response is written."""

    max_length: int = max_length_option()
    max_prompt_length: int = max_prompt_length_option()
    do_sample: bool = option(True, "sample; else greedy or beam search")
    num_beams: int = option(1, "beams of the beam search, with --no-do-sample", least=1)
    temperature: float = option(1.0, "sampling temperature", above=0)
    top_p: float = option(1.0, "sample from the smallest set of tokens with this mass; 1 is off", above=0, at_most=1)
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off", least=0)

    def streams(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """Those of `seeds` that make a difference: without sampling the first alone."""
        return tuple(seeds if self.do_sample else seeds[:1])

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        yield from response_problems(self.max_prompt_length, self.max_length)
        if self.do_sample and self.num_beams > 1:
            yield f"--num-beams {self.num_beams} needs --no-do-sample"
