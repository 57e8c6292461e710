"""What a GPU makes of it, in one table: the loss, training and evaluation.

    bash benchmarks/gpu.sh                                     # sets up what it needs, then this
    python benchmarks/gpu.py --device cpu --tiny               # whether it runs at all

Training and evaluation run on models of random weights, for their speed does not depend on them: GPT-2 xl into base,
and a pair of the sizes of Llama 3.2, 3B into 1B, with the tokenizer of --tokenizer. Beside the loss stands
Liger-Kernel's where it is installed (its published figure on an H100 is 60.7 ms and 11.1 GB, for JSD at 8,192 rows).
"""

import argparse
import importlib.util
import json
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from loss import Case, CudaMemory, HostMemory, Inputs, best_seconds, in_fresh_process, ours
from todi.criterions import build_divergence
from todi.criterions.kernels import disagreement
from todi.criterions.rows import RowTask
from train import ROOT, SEED, Workspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

Row = tuple[str, str, str]  # what is measured, what it should be, what it is


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, by their sizes, and the samples of a micro-batch."""

    name: str
    teacher: PretrainedConfig
    student: PretrainedConfig
    batch: int = 16


def pairs(tiny: bool) -> list[Pair]:
    """The pairs whose training is measured."""
    def gpt2(width: int, layers: int, heads: int) -> PretrainedConfig:
        return AutoConfig.for_model("gpt2", n_embd=width, n_layer=layers, n_head=heads)

    def llama(width: int, layers: int, heads: int, head: int) -> PretrainedConfig:
        return AutoConfig.for_model("llama", hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=8, head_dim=head, intermediate_size=8192, vocab_size=128_256,
                                    tie_word_embeddings=True)

    if tiny:
        return [Pair("tiny GPT-2", gpt2(32, 3, 4), gpt2(32, 2, 4), 2)]
    return [Pair("GPT-2 xl → base", gpt2(1600, 48, 25), gpt2(768, 12, 12)),
            Pair("3B → 1B, as Llama 3.2", llama(3072, 28, 24, 128), llama(2048, 16, 32, 64), 8)]


def random_model(config: PretrainedConfig, tokenizer: Path, folder: Path) -> str:
    """Writes a model of random weights in bf16 with this tokenizer into `folder`; returns its path."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


# ---- the loss

def kernel_rows() -> Iterator[Row]:
    """How the fused kernel's numbers differ from those of its eager twin on this GPU, by more than rounding."""
    from todi.criterions.triton_points import POINTS
    from todi.criterions.triton_rows import DTYPES, fused_rows

    for name in (None, *POINTS):
        task = RowTask(name and build_divergence(name), temperature=2.0, kd_rate=0.5 if name else 0.0,
                       label_smoothing=0.1, softcap=30.0, scale=0.5, vocabulary=0, masked=None, sparse=name is not None,
                       dtype=torch.float32, device=torch.device("cuda"), wants_gradients=True)
        for dtype in DTYPES:
            yield (f"fused kernel, {name or 'cross-entropy'}, {dtype}", "as its twin",
                   disagreement(fused_rows, dtype, task) or "as its twin")


def loss_rows(device: str, tiny: bool) -> Iterator[Row]:
    """Value and gradients in bf16 at the vocabulary of Llama 3."""
    aims = {8192: "52 ms, 5.5 GB", 1024: "8 ms"}
    for rows, aim in aims.items():
        case = Case(1000, 64, 64, 1, 64) if tiny else Case(128_256, 4096, rows, rows // 512, 512)
        for objective in ("ToDi", "js_divergence"):
            seconds, peak, share = in_fresh_process(measure_loss, case, objective, device)
            yield (f"loss, {objective}, {case.labelled:,} × {case.hidden:,}, V = {case.vocabulary:,}", f"at most {aim}",
                   f"{1000 * seconds:.1f} ms, {peak / 1e9:.1f} GB")
            yield ("its work between the products", "80 % of the copy bandwidth", f"{share:.0%}")
        if importlib.util.find_spec("liger_kernel"):
            seconds, peak = in_fresh_process(measure_liger, case, device)
            yield "Liger-Kernel, JSD, the same", "–", f"{1000 * seconds:.1f} ms, {peak / 1e9:.1f} GB"


def measure_loss(case: Case, objective: str, device: str) -> tuple[float, int, float]:
    """Best seconds, peak extra bytes, and the share of the copy bandwidth that what lies between the products reaches.

    That must move at least the logits of both in and the gradient out, 14 bytes for an entry in bf16 with three passes
    over both, of which the last writes.
    """
    inputs = Inputs.of(case, device, torch.bfloat16)

    def step() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        ours(inputs, objective).backward()

    seconds, peak = measured(step, device)
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    logits = hidden @ weight.T
    copied, d_weight = torch.empty_like(logits), torch.zeros_like(weight)
    products = (2 * best_seconds(lambda: torch.mm(hidden, weight.T, out=copied), device)
                + best_seconds(lambda: logits @ weight, device)
                + best_seconds(lambda: torch.mm(logits.T, hidden, out=d_weight), device))
    bandwidth = 2 * logits.nbytes / best_seconds(lambda: copied.copy_(logits), device)
    return seconds, peak, 14 * logits.numel() / max(seconds - products, 1e-9) / bandwidth


def measure_liger(case: Case, device: str) -> tuple[float, int]:
    """The same with LigerFusedLinearJSDLoss."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss()
    inputs = Inputs.of(case, device, torch.bfloat16)

    def step() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        loss(inputs.hidden.flatten(0, 1), inputs.weight, inputs.teacher_hidden.flatten(0, 1), inputs.teacher_weight,
             inputs.labels.flatten()).backward()

    return measured(step, device)


def measured(step, device: str) -> tuple[float, int]:
    """Best seconds and peak extra bytes."""
    step()
    memory = CudaMemory() if device == "cuda" else HostMemory()
    step()
    return best_seconds(step, device, 10), memory.extra_peak()


# ---- training and evaluation

def training_rows(pair: Pair, work: Workspace) -> Iterator[Row]:
    """A run from the live teacher, and one from its cache."""
    options = ("--batch-size", str(pair.batch), "--gradient-accumulation-steps", "2", "--log-interval", "10")
    for name, cached in (("live teacher", False), ("cached teacher", True)):
        speed = work.distil("bf16", cached, *options).metrics
        peak = f"MFU {speed['mfu']:.0%}" if "mfu" in speed else "peak unknown"
        yield (f"training, {pair.name}, {name}", "–", f"{speed['tokens_per_second']:,.0f} tokens/s, {peak}, "
               f"{speed['padding']:.0%} padding, waiting {waiting(speed):.0%}, {speed['peak_memory_gib']:.1f} GiB")


def waiting(speed: dict[str, float]) -> float:
    """Its share of the time."""
    return speed["seconds_waiting"] / sum(value for name, value in speed.items() if name.startswith("seconds_"))


def evaluation_row(name: str, work: Workspace, prompts: list[str], seeds: int = 5) -> Row:
    """One set with several seeds; random weights write responses of full length."""
    folder = work.folder / "sets" / "dolly"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "valid.jsonl").write_text("\n".join(prompts) + "\n")
    results = work.folder / "evaluation"
    work.run("todi.evaluate", "--model-path", work.student, "--sets-dir", str(folder.parent), "--sets", "dolly",
             "--seeds", *map(str, range(seeds)), "--save-dir", str(results), "--batch-size", "256")
    summary = json.loads((results / "eval" / "results.json").read_text())["sets"]["dolly"]
    tokens = summary["response_tokens"] * len(prompts) * seeds
    seconds = int(re.search(r"dolly: rouge-l .* \((\d+) s\)", work.output)[1])
    return f"evaluation, {name}", "–", f"{tokens / seconds:,.0f} new tokens/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--data", type=Path, default=ROOT / "data/demo/train.jsonl", help="records in JSON lines")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model_hub/smollm2/smollm2-135m-instruct")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether it runs")
    args = parser.parse_args()
    records = random.Random(SEED).choices(args.data.read_text().splitlines(), k=16 if args.tiny else args.samples)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"| on {name}, torch {torch.__version__} | aim | measured |\n| --- | --- | --- |", flush=True)
    for row in (*(kernel_rows() if args.device == "cuda" else ()), *loss_rows(args.device, args.tiny)):
        print(f"| {' | '.join(row)} |", flush=True)
    for pair in pairs(args.tiny):
        with tempfile.TemporaryDirectory() as folder:
            teacher, student = (random_model(config, args.tokenizer, Path(folder, role))
                                for role, config in (("teacher", pair.teacher), ("student", pair.student)))
            work = Workspace(Path(folder), teacher, records, student)
            for row in (*training_rows(pair, work), evaluation_row(pair.name, work, records[:256])):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
