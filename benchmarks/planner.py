"""How a step is cut: how much is padding, and how long ranks wait for one another, by the number of ranks.

    python benchmarks/planner.py --model MODEL --data FILE.jsonl

Nothing is computed: what a micro-batch costs is counted (docs/performance.md), for a student with 12 layers of the
model's and the model itself as a live teacher. A step has 8 samples a rank; padded, each rank has 4 x 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

from todi.data.plans import Cost, PackedShape, StepShape
from todi.data.records import load_records
from todi.data.sample_sources import shuffled
from todi.data.tokenize import Example, encode_examples
from todi.models.backbone import backbone_and_head
from todi.models.families import family_of
from todi.models.loading import empty_model, load_config, load_tokenizer
from todi.training.speed import forward_cost, training_cost

ROOT = Path(__file__).parents[1]
BATCH, ACCUMULATION, LENGTH, EPOCHS, SEED = 4, 2, 512, 8, 10


def cost_of_training(model: str) -> Cost:
    """Of a token of a student of 12 layers and its live teacher."""
    config = load_config(model)
    teacher = forward_cost(*backbone_and_head(empty_model(config)))
    config.num_hidden_layers = 12
    return teacher + training_cost(*backbone_and_head(empty_model(config)))


def laid_out(part: Sequence[Example], padded: bool) -> list[Example]:
    """The samples as long as they are computed."""
    if not padded:
        return list(part)
    longest = max(map(len, (example.ids for example in part)), default=0)
    return [Example(example.ids + (0,) * (longest - len(example.ids)), example.prompt_length) for example in part]


def measure(shapes: Sequence[StepShape], examples: Sequence[Example], cost: Cost, padded: bool) -> tuple[float, float]:
    """Share of the time that ranks wait, and computed positions for each token."""
    work = end = tokens = positions = 0
    for epoch in range(EPOCHS):
        order = [examples[i] for i in shuffled(len(examples), SEED, epoch)]
        for start in range(0, len(order) - shapes[0].samples + 1, shapes[0].samples):
            plans = [shape.cut(order[start:start + shape.samples]) for shape in shapes]
            parts = [[(part, laid_out(part, padded)) for part in plan.micro_batches] for plan in plans]
            # padding has no labels
            costs = [sum(Cost(cost.token, 0, cost.pair).of(computed) + Cost(row=cost.row).of(part)
                         for part, computed in rank) for rank in parts]
            work, end = work + sum(costs), end + len(shapes) * max(costs)
            tokens += sum(len(example.ids) - 1 for rank in parts for part, _ in rank for example in part)
            positions += sum(len(example.ids) - 1 for rank in parts for _, computed in rank for example in computed)
    return 1 - work / end, positions / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "model_hub/smollm2/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "data/demo/train.jsonl")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    examples = encode_examples(load_records(arguments.data), tokenizer, family_of("auto", "llama"), LENGTH, LENGTH // 2)
    cost, longest = cost_of_training(arguments.model), max(len(example.ids) for example in examples) - 1
    print("| ranks | waiting, padded | waiting, packed | computed / real, padded | computed / real, packed |")
    print("| --- | --- | --- | --- | --- |")
    for ranks in (1, 2, 4, 8, 32):
        padded = [StepShape(BATCH, ACCUMULATION, rank, ranks) for rank in range(ranks)]
        packed = [PackedShape(BATCH, ACCUMULATION, rank, ranks, max_tokens=BATCH * longest, cost=cost)
                  for rank in range(ranks)]
        figures = [measure(shapes, examples, cost, shapes is padded) for shapes in (padded, packed)]
        print(f"| {ranks} |", " | ".join(f"{figures[way][what]:.2f}" for what in (0, 1) for way in (0, 1)), "|")


if __name__ == "__main__":
    main()
