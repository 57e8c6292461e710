"""A program, under torchrun too: trains through the doors of the library, and prints the losses of each step.

    python tests/doors.py PLAN.json OUTPUT.json

The plan has a list of runs: objective, kd_params, peft_path (of an adapter to go on with) and folder, beside the common
`student`, `teacher`, `data` and `settings` of `todi.distil`.
"""

import json
import os
import sys
from pathlib import Path

import todi
import torch
from peft import PeftModel
from todi.data.plans import StepShape
from todi.data.sample_sources import build_source
from todi.data.tokenize import Example
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

PARTS = ("loss", "kd", "ce", "accuracy", "kd_share")


def losses(lines: list[dict]) -> list[dict[str, float]]:
    return [{name: line[name] for name in PARTS if name in line} for line in lines]


def script(plan: dict, run: dict) -> list[dict[str, float]]:
    """By paths."""
    teacher = plan["teacher"] if distils(run) else None
    result = todi.distil(plan["student"], teacher, data=plan["data"], objective=run["objective"],
                         kd_params=run["kd_params"], save_dir=f"{run['folder']}-script", **lora(run),
                         **plan["settings"])
    return losses(result.of("train"))


def notebook(plan: dict, run: dict) -> list[dict[str, float]]:
    """By loaded models and records."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(plan[role]) for role in ("student", "teacher"))
    records = {split: [json.loads(line) for line in Path(plan["data"], f"{split}.jsonl").read_text().splitlines()]
               for split in ("train", "dev")}
    result = todi.distil(student, teacher if distils(run) else None, data=records,
                         tokenizer=AutoTokenizer.from_pretrained(plan["student"]), objective=run["objective"],
                         kd_params=run["kd_params"], save_dir=f"{run['folder']}-notebook", **lora(run),
                         **plan["settings"])
    return losses(result.of("train"))


def distils(run: dict) -> bool:
    return run["objective"] != "cross_entropy"


def lora(run: dict) -> dict[str, str]:
    return {"peft": "lora", "peft_path": run["peft_path"]} if run["peft_path"] else {}


def trainer(plan: dict, run: dict, **more: object) -> list[dict[str, float]]:
    """By `ToDiTrainer`, over the samples in the order in which the others take them."""
    settings = plan["settings"]
    # before TrainingArguments: with ZeRO-3 in them, transformers takes models apart as it loads them
    model, taught_by = (AutoModelForCausalLM.from_pretrained(plan[role]) for role in ("student", "teacher"))
    if run["peft_path"]:
        model = PeftModel.from_pretrained(model, run["peft_path"], is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(plan["student"])
    tokenizer.pad_token = tokenizer.eos_token
    rows = todi.encode_file(Path(plan["data"], "train.jsonl"), tokenizer, model_type="gpt2",
                            max_length=settings["max_length"], max_prompt_length=settings["max_prompt_length"])
    size = settings["global_batch_size"]
    examples = [Example(tuple(row["input_ids"]), 1, row["sample_ids"]) for row in rows]
    source = build_source(examples, [len(rows)], (), StepShape(size, 1, 0, 1, size), settings["seed"])
    order = [example.sample_id for epoch in range(settings["num_epochs"]) for step in source.steps(epoch + 1, 0)
             for part in step.micro_batches for example in part]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        f"{run['folder']}-trainer", per_device_train_batch_size=2, gradient_accumulation_steps=size // 2 // ranks,
        num_train_epochs=1, learning_rate=settings["lr"], weight_decay=0.01, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 1e-7 / settings["lr"]}, optim="adamw_torch",
        train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, **more)
    teacher = {"teacher": taught_by} if distils(run) else {}
    made = todi.ToDiTrainer(model, arguments, objective=run["objective"], kd_params=run["kd_params"],
                            train_dataset=[rows[i] for i in order], data_collator=DataCollatorForSeq2Seq(tokenizer),
                            **teacher)
    made.train()
    return losses([line for line in made.state.log_history if "loss" in line])


def zero(plan: dict, run: dict) -> list[dict[str, float]]:
    """By `ToDiTrainer` with DeepSpeed's ZeRO-3 under it."""
    return trainer(plan, run, deepspeed={
        "zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto"})


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    # a group that a Trainer has made stays, and is used by those after it
    found = {f"{run['name']} {door.__name__}": door(plan, run)
             for run in plan["runs"] for door in (script, notebook, trainer)}
    if "RANK" in os.environ:  # DeepSpeed asks for torchrun; and once, for what a Trainer says of ZeRO-3 stays too
        run = next(run for run in plan["runs"] if run["name"] == "ToDi")
        found["ToDi zero"] = zero(plan, run)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
