"""Loss curves that no change of the code may move: 20 steps of tiny models in fp32.

    PYTHONPATH=code:tests python tests/pinned.py     # writes tests/assets/losses/, when a change is meant

The numbers are those of metrics.jsonl, to the last digit. They are bound to the processor and to the versions of the
libraries, which the file names; elsewhere they agree to about six digits.
"""

import json
import tempfile
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import cpuinfo
from launching import Run, Workshop

ASSETS = Path(__file__).parent / "assets" / "losses"
CURVES = ("loss", "kd", "ce", "accuracy", "gradient_norm")
LORA = {"PEFT": "lora", "LORA_ALPHA": 8, "LORA_DROPOUT": 0.1}
SFT, KD = "gpt2/sft_gpt2_base", "gpt2/vanilla_kd_gpt2_base"
RUNS = {"sft-full": (SFT, {}), "sft-lora": (SFT, LORA), "todi-full": (KD, {}), "todi-lora": (KD, LORA)}


def start(workshop: Workshop, name: str) -> "Future[Run]":
    """A pinned run, under way."""
    models = {role: workshop.model(f"pinned-{role}", family="gpt2", hidden=hidden, seed=seed, resid_pdrop=0.1)
              for role, hidden, seed in (("teacher", 48, 1), ("student", 32, 2))}
    common = {"MODEL_PATH": models["student"], "TEACHER_MODEL_PATH": models["teacher"], "EPOCH": 7, "MAX_STEPS": 20,
              "LR": 3e-3, "EVAL_GEN": 0, "PACKING": "off"}
    launcher, settings = RUNS[name]
    return workshop.train(launcher, f"pinned-{name}", **common | settings)


def curves(run: Run) -> dict[str, list[float]]:
    """The pinned numbers of a finished run, a list of 20 each."""
    assert run.exit_code == 0, run.output
    lines = run.metrics("train")
    return {name: [line[name] for line in lines] for name in CURVES if name in lines[0]}


def made_with() -> dict[str, str]:
    """What the last digits depend on besides this project's code."""
    libraries = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"processor": cpuinfo.get_cpu_info()["brand_raw"]} | libraries


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for name, run in {name: start(workshop, name) for name in RUNS}.items():
            record = {"made_with": made_with(), "curves": curves(run.result())}
            (ASSETS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
