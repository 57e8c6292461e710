"""Runs todi.evaluate and other entry points in this process, on tiny checkpoints and data."""

import json
import logging
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from todi import evaluate
from todi.errors import run_main
from transformers import AutoModelForCausalLM

SETTINGS = {"PRECISION": "fp32", "MAX_LENGTH": 40, "MAX_PROMPT_LENGTH": 16}  # what run_evaluate gives, for a launcher


def run(monkeypatch, module, *words):
    """Runs an entry point as the command line does; returns its exit code."""
    ours = logging.getLogger("todi")
    before = ours.handlers, ours.propagate, ours.level
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, words)])
    try:
        with pytest.raises(SystemExit) as exit:
            run_main(module.main)
    finally:  # what it set up writes to an output that is captured for this test alone
        ours.handlers, ours.propagate = before[:2]
        ours.setLevel(before[2])
    return exit.value.code


def run_evaluate(monkeypatch, checkpoint, data, save_dir, *words):
    return run(monkeypatch, evaluate, "--model-path", checkpoint, "--data-dir", data, "--save-dir", save_dir,
               "--precision", "fp32", "--max-length", 40, "--max-prompt-length", 16, *words)


def responses(folder):
    """The files of responses, to the byte."""
    return {str(path.relative_to(folder / "eval")): path.read_bytes() for path in sorted(folder.rglob("seed*.jsonl"))}


def generations(folder):
    return {str(path.relative_to(folder / "eval")): [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(folder.rglob("*.jsonl"))}


def add_adapter(base, folder):
    """Saves a LoRA adapter of `base` that changes what it writes."""
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
