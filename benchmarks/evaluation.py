"""Sampling 5 responses a prompt and scoring them: todi.evaluate beside a plain loop as published.

    python benchmarks/evaluation.py --model CKPT --data data/dolly/valid.jsonl      # the table of benchmarks/README.md

The plain loop does what the published evaluation scripts do, with transformers alone: a process for each seed that
loads the model anew, prompts padded on the left to 256 tokens, in file order, a full forward over prompt and response
for the loss of each batch, `generate` with sampling, the scores of all steps kept, and no_repeat_ngram_size=6, then
ROUGE-L. todi's time is that of the whole command `python -m todi.evaluate`, start and model loading included, for all
seeds. Both write up to 256 new tokens at temperature 1 and end a response at EOS; since they draw from different random
streams, they write different texts of about the same length, and the table gives the tokens.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from launched import launched

ROOT = Path(__file__).parents[1]
SEEDS = (10, 20, 30, 40, 50)
PROMPT_TOKENS, NEW_TOKENS = 256, 256
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass
class Measured:
    """Seconds and CPU seconds of `seeds` seeds over all prompts, the tokens written in them, and mean ROUGE-L."""

    seconds: float
    cpu: float
    seeds: int
    tokens: int
    rouge_l: float

    @property
    def seconds_for_all(self) -> float:
        return self.seconds * len(SEEDS) / self.seeds

    @property
    def cpu_for_all(self) -> float:
        return self.cpu * len(SEEDS) / self.seeds


class Timer:
    """Seconds, and CPU seconds of child processes, between two points of time."""

    def __init__(self):
        self._started, self._used = time.perf_counter(), self._cpu()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._started, self._cpu() - self._used

    @staticmethod
    def _cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime


def plain(model_path: str, data: Path, prompts: int, batch_size: int, precision: str, seed: int) -> Measured:
    """One seed of the plain loop; run in a fresh process, whose time is taken outside."""
    import torch
    from rouge_score.rouge_scorer import RougeScorer
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, DTYPES[precision])).eval()
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_length=PROMPT_TOKENS + NEW_TOKENS,
        no_repeat_ngram_size=6, return_dict_in_generate=True, output_scores=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    losses, scores, tokens = [], [], 0
    with torch.no_grad():
        for batch in batches(read_records(data, prompts), batch_size):
            asked = tokenizer([record["prompt"] for record in batch], padding="max_length", truncation=True,
                              max_length=PROMPT_TOKENS, return_tensors="pt")
            ids, mask, labels = with_responses(asked, [first(record["output"]) for record in batch], tokenizer)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
            losses.append(functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item())
            written = model.generate(**asked, generation_config=settings).sequences[:, PROMPT_TOKENS:]
            tokens += (written != tokenizer.eos_token_id).sum().item()
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            scores += [max(scorer.score(text, response)["rougeL"].fmeasure for text in several(record["output"]))
                       for record, response in zip(batch, texts, strict=True)]
    return Measured(0, 0, 1, tokens, 100 * sum(scores) / len(scores))


def with_responses(asked, responses: list[str], tokenizer):
    """Ids, mask and labels (B, 512) of padded prompts with the reference and EOS behind them."""
    import torch

    width = PROMPT_TOKENS + NEW_TOKENS
    ids = torch.full((len(responses), width), tokenizer.eos_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    ids[:, :PROMPT_TOKENS], mask[:, :PROMPT_TOKENS] = asked["input_ids"], asked["attention_mask"]
    for row, response in enumerate(responses):
        answer = (tokenizer(response)["input_ids"] + [tokenizer.eos_token_id])[:NEW_TOKENS]
        place = slice(PROMPT_TOKENS, PROMPT_TOKENS + len(answer))
        ids[row, place] = labels[row, place] = torch.tensor(answer)
        mask[row, place] = 1
    return ids, mask, labels


def ours(model_path: str, data: Path, prompts: int, batch_size: int, precision: str) -> Measured:
    """All seeds by `python -m todi.evaluate`."""
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "data" / "set").mkdir(parents=True)
        (Path(temporary) / "data" / "set" / "valid.jsonl").symlink_to(data.absolute())
        command = [sys.executable, "-m", "todi.evaluate", "--model-path", model_path, "--save-dir", temporary,
                   "--data-dir", f"{temporary}/data", "--sets", "set", "--seeds", *map(str, SEEDS),
                   "--limit", str(prompts), "--batch-size", str(batch_size), "--precision", precision,
                   "--max-length", str(PROMPT_TOKENS + NEW_TOKENS), "--max-prompt-length", str(PROMPT_TOKENS)]
        timer = Timer()
        subprocess.run(command, check=True, env={**os.environ, **launched(), "PYTHONPATH": str(ROOT / "code")})
        seconds, cpu = timer.read()
        summary = json.loads((Path(temporary) / "eval" / "results.json").read_text())["sets"]["set"]
    tokens = round(summary["response_tokens"] * prompts * len(SEEDS))
    return Measured(seconds, cpu, len(SEEDS), tokens, summary["rouge_l"])


def read_records(data: Path, limit: int) -> list[dict]:
    return [json.loads(line) for line in data.read_bytes().splitlines()[:limit]]


def batches(items: list, size: int) -> list[list]:
    return [items[start:start + size] for start in range(0, len(items), size)]


def several(output: str | list[str]) -> list[str]:
    return [output] if isinstance(output, str) else output


def first(output: str | list[str]) -> str:
    return several(output)[0]


def plain_in_processes(options: argparse.Namespace, precision: str) -> Measured:
    """The plain loop over the first `options.plain_seeds` seeds, each in a process of its own as published."""
    total = Measured(0, 0, 0, 0, 0)
    for seed in SEEDS[:options.plain_seeds]:
        command = [sys.executable, __file__, *sys.argv[1:], "--one-plain-seed", precision, str(seed)]
        timer = Timer()
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        seconds, cpu = timer.read()
        part = Measured(**json.loads(answer.stdout.splitlines()[-1]))
        total = Measured(total.seconds + seconds, total.cpu + cpu, total.seeds + 1, total.tokens + part.tokens,
                         total.rouge_l + (part.rouge_l - total.rouge_l) / (total.seeds + 1))
    return total


def table(rows: dict[str, Measured]) -> str:
    """Markdown; the first row is what the others are compared to."""
    base = next(iter(rows.values()))
    lines = [f"| | seeds run | measured | {len(SEEDS)} seeds | faster | CPU time of {len(SEEDS)} | less | "
             "tokens a response | ROUGE-L |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.seeds} | {row.seconds:.0f} s | {row.seconds_for_all:.0f} s | "
                     f"{base.seconds_for_all / row.seconds_for_all:.1f} × | {row.cpu_for_all:.0f} s | "
                     f"{base.cpu_for_all / row.cpu_for_all:.1f} × | {row.tokens:.0f} | {row.rouge_l:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_hub/smollm2/smollm2-135m-instruct", help="a model folder")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "demo" / "valid.jsonl", help="a JSON-lines file")
    parser.add_argument("--prompts", type=int, default=32, help="how many of its records")
    parser.add_argument("--plain-batch-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=0,
                        help="responses written together by todi; 0: as many as it chooses")
    parser.add_argument("--plain-seeds", type=int, default=1, choices=range(1, len(SEEDS) + 1),
                        help="seeds that the plain loop is run for; its time is scaled to all")
    parser.add_argument("--plain-precisions", nargs="*", default=["fp32"], choices=list(DTYPES),
                        help="of the plain loop; none leaves it out")
    parser.add_argument("--precisions", nargs="*", default=["auto", "fp32"], help="of todi")
    parser.add_argument("--one-plain-seed", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_plain_seed:
        precision, seed = options.one_plain_seed
        measured = plain(options.model, options.data, options.prompts, options.plain_batch_size, precision, int(seed))
        print(json.dumps(vars(measured)))
        return
    rows = {}
    for precision in options.plain_precisions:
        rows[f"plain loop, {precision}"] = plain_in_processes(options, precision)
    for precision in options.precisions:
        rows[f"todi.evaluate, {precision}"] = ours(options.model, options.data, options.prompts, options.batch_size,
                                                   precision)
    for row in rows.values():
        row.tokens /= options.prompts * row.seeds
    print(table(rows))


if __name__ == "__main__":
    main()
