#!/usr/bin/env bash
# SFT of a LoRA adapter on OLMo-2-7B, the teacher.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY olmo2
default CKPT_NAME olmo2-7b
default PEFT lora
default LORA_RANK 256
default LORA_ALPHA 8
default LORA_DROPOUT 0.1
default LR 1e-3
default BATCH_SIZE 4
default GRAD_ACC 2
default EPOCH 10

sft "$@"
