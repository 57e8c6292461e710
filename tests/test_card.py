"""The model card that a checkpoint carries."""

import dataclasses
from collections.abc import Sequence

import pytest
import yaml
from todi.models.card import Base, model_card
from todi.models.families import FAMILIES, family_of
from todi.options import parse
from todi.settings import TrainConfig

STUDENT = Base("model_hub/qwen2.5/qwen2.5-0.5b", FAMILIES["qwen2.5"])
TEACHER = Base("model_hub/qwen2.5/qwen2.5-7b", FAMILIES["qwen2.5"], adapter="outputs/teacher")


def card(words: list[str], student: Base = STUDENT, teachers: Sequence[Base] = (TEACHER,)) -> tuple[dict, str]:
    """Front matter and text."""
    settings = dataclasses.asdict(parse(TrainConfig, words))
    text = model_card(settings, {"data/dolly/train.jsonl": "abc123"}, {"torch": "2.13"}, student, teachers,
                      {"loss": 1.23456, "ROUGE-L": 25.5})
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_distillation_in_full():
    front, body = card(["--kd-objective", "ToDi", "--kd-params", "beta=0.5", "--kd-rate", "0.3", "--lr", "0.00123"])
    assert front == {"license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
                     "base_model": "Qwen/Qwen2.5-0.5B", "base_model_relation": "finetune",
                     "tags": ["todi", "knowledge-distillation"]}
    for said in ("# qwen2.5-0.5b, ToDi", "by ToDi (beta=0.5) at temperature 2", "(1 - 0.3) cross-entropy + 0.3 diver",
                 "`model_hub/qwen2.5/qwen2.5-7b` (Qwen/Qwen2.5-7B) with the adapter `outputs/teacher`",
                 "| loss | 1.2346 |", "| ROUGE-L | 25.5000 |", "| `data/dolly/train.jsonl` | `abc123` |",
                 '"lr": 0.00123', "torch 2.13", "the Apache-2.0 licence"):
        assert said in body


def test_sft_of_an_adapter():
    front, body = card(["--criterion", "cross_entropy", "--peft", "lora", "--peft-lora-r", "16"], teachers=())
    assert front["library_name"] == "peft"
    assert front["base_model_relation"] == "adapter"
    assert front["tags"] == ["todi", "sft", "lora"]
    assert '"peft_lora_r": 16' in body
    assert "A LoRA adapter on `model_hub/qwen2.5/qwen2.5-0.5b`" in body
    assert 'base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")' in body
    assert "teacher's" not in body


@pytest.mark.parametrize(("base", "name", "licence"), [
    (Base("model_hub/gemma3/gemma3-1b", FAMILIES["gemma3"]), "google/gemma-3-1b-pt", "gemma"),
    (Base("meta-llama/Llama-2-7b-hf", FAMILIES["llama2"]), "meta-llama/Llama-2-7b-hf", "llama2"),
    (Base("model_hub/smollm2/smollm2-12-layers", FAMILIES["smollm2"]), None, "apache-2.0"),
    (Base("somewhere/else", family_of("auto", "mamba")), None, "other")])
def test_what_is_known_of_a_base(base, name, licence):
    front, _ = card([], student=base)
    assert front.get("base_model") == name
    assert front["license"] == licence
