"""docs/scaling.md: what runs of four pairs of models need on GPUs that are not here, by the doctor's simulation.

    python benchmarks/scaling.py > docs/scaling.md

Nothing is downloaded: the models are their published hyper-parameters, written down below. No GPU is used either.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on standard output what it has found

from todi.options import parse
from todi.settings import DoctorConfig
from todi.simulation import Simulation
from todi.simulation_inputs import read_simulation
from todi.simulation_tables import (
    arithmetic,
    cache_facts,
    duties_table,
    facts,
    hours_table,
    memory_table,
    traffic_table,
)
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

# As their config.json on the Hugging Face Hub has them.
MODELS: dict[str, PretrainedConfig] = {
    "gpt2-base": GPT2Config(n_embd=768, n_layer=12, n_head=12, vocab_size=50257, n_positions=1024),
    "gpt2-xlarge": GPT2Config(n_embd=1600, n_layer=48, n_head=25, vocab_size=50257, n_positions=1024),
    "tinyllama-1.1b": LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                                  num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048),
    "llama2-7b": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                             num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096),
    "qwen2.5-7b": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                              num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072),
    "qwen2.5-72b": Qwen2Config(vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
                               num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072),
    "llama3.1-8b": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                               num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072),
    "llama3.1-405b": LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                                 num_attention_heads=128, num_key_value_heads=8, max_position_embeddings=131072),
}
LENGTHS = ["--train-samples", "10000", "--prompt-tokens", "128", "--response-tokens", "128"]


@dataclass(frozen=True)
class Pair:
    """Two models and where the student is trained.

    Attributes:
        words: further options of the doctor.
    """

    student: str
    teacher: str
    nodes: int
    gpus: int
    words: Sequence[str] = ()

    @property
    def title(self) -> str:
        return f"{self.teacher} to {self.student}, {self.nodes} x {self.gpus} H100"


PAIRS = (Pair("gpt2-base", "gpt2-xlarge", 1, 8), Pair("tinyllama-1.1b", "llama2-7b", 1, 8),
         Pair("qwen2.5-7b", "qwen2.5-72b", 4, 8, ["--gradient-checkpointing"]),
         Pair("llama3.1-8b", "llama3.1-405b", 4, 8, ["--gradient-checkpointing"]))
IN_FULL = PAIRS[2]  # with traffic and the first rank's duties

INTRODUCTION = """# What does a run need on other machines?

```bash
python -m todi.doctor --nodes 4 --gpus 8 --gpu H100 --model-path model_hub/gpt2/gpt2-base \\
    --teacher-model-path model_hub/gpt2/gpt2-xlarge --data-dir data/dolly
```

says so by arithmetic, for any pair, with all options of `todi.train`, on a machine without a GPU: memory by part for
every ZeRO stage with the teacher live and cached, what is sent in a step, hours, and what the first rank does alone.
It reads `config.json` of the models, and the data with the student's tokenizer; with `--train-samples`,
`--prompt-tokens` and `--response-tokens` it needs neither, and takes all samples to be of these lengths but for the
longest, which has `--max-length`. `--deepspeed_config` counts as in a run. [settings.md](settings.md) has the other
options.

**Nothing on this page was measured on a GPU; there was none.** The MFU of 40 % is an assumption (`--assumed-mfu`),
and so are 50 GB/s between machines. The page is written by `benchmarks/scaling.py`.

## How it is worked out

- *Weights, gradients, optimizer*: by stage as in Rajbhandari et al., 2020; fp32 masters and two moments, fp32
  gradients while the optimizer works. `ZERO_STAGE=0` in 16 bits runs as 1, so it has no line. *Teacher*: all of its
  weights on each GPU, or of a cached one the head.
- *Activations and loss*: what autograd keeps of a forward of one micro-batch (`BATCH_SIZE` of the longest samples, or
  `MAX_TOKENS`; packed samples take as much), from a forward without numbers on a CPU.
- *DeepSpeed's buffers*: the gradient bucket (`reduce_bucket_size`, 5e8 numbers: 0.93 GiB in 16 bits, 1.86 in fp32,
  twice with `overlap_comm` at stages 1 and 2) is allocated in full however small the model is; besides a flat copy of
  what is sent, at stage 2 of gradients that are kept whole (about the largest), and at stage 3 of weights that are
  gathered at a time: half of `stage3_max_reuse_distance`, `stage3_prefetch_bucket_size`, the embedding, and tensors
  below `stage3_param_persistence_threshold`. Read off DeepSpeed's code.
- *NCCL* 0.5 GiB within a machine and 1 GiB between several, *CUDA* 1.5 GiB, *holes* 5 % of what the allocator holds:
  assumed.
- *Sent*: a ring of n ranks sends 2 (n − 1)/n of a tensor's bytes for an all-reduce, (n − 1)/n for an all-gather or a
  reduce-scatter, of which one in `GPUs of a machine` leaves it. Stages 1 and 2 all-reduce gradients, as DeepSpeed
  does by default, stage 2 for each micro-batch; stage 3 gathers weights in each forward, and those not used again
  soon in each backward.
- *Hours*: steps × (operations / (GPUs × peak × MFU) + exposed sending); operations as in
  [performance](performance.md#what-is-counted), sending beside the computing counts as far as it takes longer.
  Evaluation, checkpoints, the start, latency and the optimizer's time with `OFFLOAD` come besides.

## What was checked

Against DeepSpeed's engine on a CPU (gloo, a model of 137,280 parameters, fp32 and bf16, full and LoRA, three
micro-batches a step; `tests/test_scaling.py`): with 1, 2 and 4 processes, and for the first of 32 ranks whose others
are not there (a process group that sends nothing), the bytes handed to each kind of collective operation and the
bytes of weights, gradients and optimizer that the first rank holds are within 2 % of what the simulation says of that
model; what is left over is padding. The files of a state are compared with what the simulation says of the first
rank. Seconds, the buffers of a GPU and what NCCL sends for an operation were compared with nothing.
"""


def simulate(pair: Pair) -> Simulation:
    """In the current folder, which gets the configurations."""
    for name in (pair.student, pair.teacher):
        MODELS[name].save_pretrained(name)
    words = ["--nodes", str(pair.nodes), "--gpus", str(pair.gpus), "--model-path", pair.student,
             "--teacher-model-path", pair.teacher, *LENGTHS, *pair.words]
    return read_simulation(parse(DoctorConfig, words))


def section(pair: Pair) -> str:
    """Of the page."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        found = simulate(pair)
        parts = [f"## {pair.title}", "\n".join(f"- {fact}" for fact in facts(found)),
                 "GiB on a GPU when it is fullest:", memory_table(found)]
        if pair is IN_FULL:
            parts += ["GB that a GPU sends in a step:", traffic_table(found)]
        parts += [hours_table(found), arithmetic(found), cache_facts(found)]
        if pair is IN_FULL:
            parts += ["What the first rank does alone; where there is more of it with more ranks, it is bytes:",
                      duties_table(found)]
    return "\n\n".join(parts)


def main() -> None:
    print("\n\n".join([INTRODUCTION.rstrip(), *map(section, PAIRS)]))


if __name__ == "__main__":
    main()
