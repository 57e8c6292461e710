"""A program, under torchrun: a teacher spread over the ranks beside a whole one, what a student learns of each, and a
cache that each of them fills.

    python tests/spread_ranks.py PLAN.json OUTPUT.json

The plan has `teachers`, folders by name, `student`, a folder, `data`, a JSON-lines file, and `folder` for the caches.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from paces import build
from todi.criterions import DistillationCriterion, build_divergence
from todi.data.batches import collate
from todi.data.records import load_records
from todi.data.tokenize import encode_examples
from todi.models.families import family_of
from todi.models.loading import load_config, load_tokenizer
from todi.runtime.device import Precision, dtype_of
from todi.runtime.distributed import process_group, world_from_environment
from todi.settings import DataConfig
from todi.teacher import cache_files, spread
from todi.teacher.cache_files import CacheStore
from todi.teacher.live import LiveTeacher
from todi.teacher.opening import fill_cache, open_live
from todi.teacher.spec import TeacherSpec

CPU = torch.device("cpu")


def spec_of(path: str, file: Path, precision: str) -> TeacherSpec:
    tokenizer, family = load_tokenizer(path), family_of("auto", load_config(path).model_type)
    data = DataConfig(data_dir=(str(file.parent),), max_length=64, max_prompt_length=48)
    examples = encode_examples(load_records(file, None), tokenizer, family, 64, 48)
    chosen = Precision(precision, "test")
    stored = dtype_of(None, chosen.dtype)
    return TeacherSpec(path, None, "auto", None, data, chosen, stored, tokenizer, examples, [file])


def difference(one: LiveTeacher, another: LiveTeacher, spec: TeacherSpec, rank: int) -> float:
    """Largest between their logits, for batches of this rank, packed and padded."""
    found = []
    for packed in (False, True):
        for start in (0, 4):
            batch = collate(spec.examples[start + rank:start + rank + 3], 0, packed)
            logits = [teacher.rows(batch).logits(slice(0, 64), 300, 1.0) for teacher in (one, another)]
            found.append((logits[0] - logits[1]).abs().max().item())
    return max(found)


def losses(student: str, stage: int, teacher: LiveTeacher, spec: TeacherSpec, rank: int) -> list[float]:
    """Of some steps of a student under a ZeRO stage, on this rank."""
    engine, found = build(student, stage, lora=False), []
    engine.eval()
    for start in range(0, 12, 4):
        batch = collate(spec.examples[start + 2 * rank:start + 2 * rank + 2], 0)
        sums, _ = engine(batch, DistillationCriterion(build_divergence("ToDi")), teacher.rows(batch))
        engine.backward(sums["loss"] / 50, scale_wrt_gas=False)
        engine.step()
        found.append(sums["loss"].item())
    engine.destroy()
    return found


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    spread.WHOLE = 0  # tiny ones are cut too
    cache_files.SHARD_SAMPLES = 7  # 18 samples are 3 shards: 2 for one rank, 1 for the other
    world, found = world_from_environment(), {}
    file = Path(plan["data"])
    with process_group(world, CPU, 60):
        for name, path in plan["teachers"].items():
            for precision in ("fp32", "bf16"):
                spec = spec_of(path, file, precision)
                whole, cut = (open_live(spec, CPU, spread=over) for over in (False, True))
                held = sum(weight.ds_tensor.numel() for weight in cut.backbone.parameters())
                of_all = sum(weight.numel() for weight in whole.backbone.parameters())
                values = {"difference": difference(whole, cut, spec, world.rank), "share": held / of_all,
                          "packed": [whole.takes_packed, cut.takes_packed]}
                if precision == "fp32":
                    values["losses"] = [[losses(plan["student"], stage, teacher, spec, world.rank)
                                         for teacher in (whole, cut)] for stage in range(4)]
                backbone = cut.backbone
                del cut
                gc.collect()
                values["left"] = sum(weight.ds_tensor.numel() for weight in backbone.parameters())
                found[f"{name} {precision}"] = world.gather(values)
        spec, stores = spec_of(path, file, "fp32"), []
        for over in (False, True):
            folder = Path(plan["folder"]) / f"spread-{over}"
            fill_cache(spec, folder, world, CPU, over)
            stores.append(CacheStore(folder))
        rows = [store.read(list(range(len(spec.examples)))) for store in stores]
        found["caches"] = {"difference": (rows[0] - rows[1]).abs().max().item(), "shards": len(stores[1].shards)}
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
