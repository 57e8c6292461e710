"""Distillation with transformers' Trainer: a script as one has it already, with ToDiTrainer in place of Trainer.

    python examples/trainer_script.py STUDENT TEACHER data/demo/train.jsonl OUTPUT [STEPS]

or under torchrun or accelerate launch.
"""

import json
import sys

import todi
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

student_path, teacher_path, file, output, steps = [*sys.argv[1:], 20][:5]
tokenizer = AutoTokenizer.from_pretrained(student_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(student_path)
teacher = AutoModelForCausalLM.from_pretrained(teacher_path)


def encode(record):
    """Token ids, and labels with -100 over the prompt; Trainer and its collators do the rest."""
    prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
    response = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids, labels = prompt + response, [-100] * len(prompt) + response
    return {"input_ids": ids[:256], "labels": labels[:256]}


with open(file) as lines:
    rows = [encode(json.loads(line)) for line in lines]
held_out = max(1, len(rows) // 10)
trainer = todi.ToDiTrainer(
    model,
    TrainingArguments(output, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
                      max_steps=int(steps), logging_steps=5, eval_strategy="steps", eval_steps=int(steps),
                      save_strategy="no", report_to=[]),
    teacher=teacher, objective="ToDi", kd_rate=0.5, kd_temperature=2.0,
    train_dataset=rows[held_out:], eval_dataset=rows[:held_out], processing_class=tokenizer,
    data_collator=DataCollatorForSeq2Seq(tokenizer))
trainer.train()
trainer.save_model(output)
