"""Distillation in a training loop of one's own, with this project's loss alone.

    python examples/own_loop.py STUDENT TEACHER data/demo/train.jsonl [STEPS]
"""

import json
import sys

import torch
from todi.criterions import LinearHead, build_divergence, linear_distillation_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, MAX_LENGTH, IGNORED = 8, 256, -100

student_path, teacher_path, file, steps = [*sys.argv[1:], 20][:4]
tokenizer = AutoTokenizer.from_pretrained(student_path)
student = AutoModelForCausalLM.from_pretrained(student_path).train()
teacher = AutoModelForCausalLM.from_pretrained(teacher_path).eval().requires_grad_(False)
student_head, teacher_head = (LinearHead(model.get_output_embeddings().weight) for model in (student, teacher))
divergence = build_divergence("ToDi", beta=1.0)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)


def encode(record):
    """Inputs, and for each the token that follows it where that is part of the response."""
    prompt, response = (tokenizer(record[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "output"))
    ids = torch.tensor([*prompt, *response, tokenizer.eos_token_id][:MAX_LENGTH])
    return ids[:-1], ids[1:].masked_fill(torch.arange(len(ids) - 1) < len(prompt) - 1, IGNORED)


with open(file) as lines:
    samples = [encode(json.loads(line)) for line in lines]
for step in range(int(steps)):
    chosen = [samples[i] for i in torch.randint(len(samples), (BATCH,)).tolist()]
    ids, labels = (torch.nn.utils.rnn.pad_sequence(column, True, value)
                   for column, value in zip(zip(*chosen, strict=True), (0, IGNORED), strict=True))
    with torch.no_grad():
        teacher_hidden = teacher.base_model(ids).last_hidden_state  # causal: padding on the right is never seen
    hidden = student.base_model(ids).last_hidden_state
    sums = linear_distillation_loss(hidden.flatten(0, 1), student_head, teacher_hidden.flatten(0, 1), teacher_head,
                                    labels.flatten(), divergence=divergence, temperature=2.0, kd_rate=0.5)
    loss = sums.loss / sums.tokens
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}, divergence {sums.kd / sums.tokens:.4f}, "
          f"cross-entropy {sums.ce / sums.tokens:.4f}")
