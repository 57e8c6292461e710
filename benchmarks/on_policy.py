"""How fast a student writes what it is trained on: a round of todi's beside `generate` at every step.

    python benchmarks/on_policy.py --model STUDENT --data data/dolly/train.jsonl

The plain way asks transformers' `generate` before each step for the responses to its prompts, padded on the left. todi
asks for those of a round of steps at once. Both sample at temperature 1, up to so many tokens, from the same model in
one process; they draw other random numbers, so their texts differ, and tokens a second are compared. The plain way
takes the steps of the shortest round. They take turns, and the median counts.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

try:
    import todi  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).parents[1] / "code"))

from todi.data.records import load_records
from todi.data.tokenize import encode_prompts
from todi.generation.decoding import Decoding, stop_ids
from todi.generation.padding import check_decoding
from todi.generation.sampling import stream_key
from todi.generation.writer import Writer
from todi.models.families import family_of
from todi.models.loading import load_config, load_model, load_tokenizer
from todi.runtime.device import choose_precision
from todi.runtime.distributed import World
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer


def plain(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], samples: int,
          tokens: int) -> tuple[int, float]:
    """Tokens that `generate` writes, a step of `samples` prompts after the other, and seconds."""
    started = time.perf_counter()
    tokenizer.padding_side = "left"
    count = sum(one_step(model, tokenizer, prompts[start:start + samples], tokens)
                for start in range(0, len(prompts), samples))
    return count, time.perf_counter() - started


def one_step(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], tokens: int) -> int:
    """Tokens that `generate` writes."""
    asked = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    with torch.no_grad():
        written = model.eval().generate(**asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                        max_new_tokens=tokens, eos_token_id=tokenizer.eos_token_id,
                                        pad_token_id=tokenizer.pad_token_id)[:, asked["input_ids"].shape[1]:]
    ends = (written == tokenizer.eos_token_id).int()
    return (ends.cumsum(1) - ends == 0).sum().item()  # up to the first end, which counts


def in_a_round(writer: Writer, prompts: list[list[int]], stops: frozenset[int], number: int) -> tuple[int, float]:
    """The same of a round."""
    started = time.perf_counter()
    keys = [stream_key("benchmark", number, place) for place in range(len(prompts))]
    count = sum(len(response.ids) + (not response.cut) for response in writer.write(prompts, keys, stops))
    return count, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_hub/smollm2/smollm2-135m-instruct", help="a model folder")
    parser.add_argument("--data", type=Path, default=Path("data/demo/train.jsonl"), help="a JSON-lines file")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=8, help="of a step")
    parser.add_argument("--round-steps", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--tokens", type=int, default=256, help="of a response at most")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts that todi answers together at most")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    precision = choose_precision(options.precision, device)
    model = load_model(options.model, precision.dtype, device)
    tokenizer, config = load_tokenizer(options.model), load_config(options.model)
    check_decoding(model, options.model, tokenizer.pad_token_id)
    records = load_records(options.data, options.samples * max(options.round_steps))
    prompts = encode_prompts(records, tokenizer, family_of("auto", config.model_type), 256)
    writer = Writer(model, tokenizer, Decoding(512, options.tokens), options.batch_size, World(0, 1, 0, 1))
    stops = stop_ids(model, tokenizer, records)
    rates: dict[str, list[float]] = {}
    for turn in range(options.turns):
        steps = prompts[:options.samples * min(options.round_steps)]
        found = {"generate at every step": plain(model, tokenizer, steps, options.samples, options.tokens)}
        found |= {f"a round of {steps} steps": in_a_round(writer, prompts[:steps * options.samples], stops, turn)
                  for steps in options.round_steps}
        for name, (count, seconds) in found.items():
            rates.setdefault(name, []).append(count / seconds)
    base = statistics.median(next(iter(rates.values())))
    print(f"{options.model} in {precision.name} on {device.type}, {options.samples} samples a step\n")
    print("| | tokens/s | faster |\n| --- | --- | --- |")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} | {statistics.median(values) / base:.1f} × |")


if __name__ == "__main__":
    main()
