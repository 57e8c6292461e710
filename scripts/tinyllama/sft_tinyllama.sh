#!/usr/bin/env bash
# SFT of a LoRA adapter on TinyLlama-1.1B, the baseline of its distillation.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY tinyllama
default CKPT_NAME tinyllama-1.1b
default PEFT lora
default LORA_RANK 256
default LORA_ALPHA 8
default LORA_DROPOUT 0.1
default LR 1e-3
default BATCH_SIZE 4
default GRAD_ACC 2
default EPOCH 10

sft "$@"
