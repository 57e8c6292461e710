#!/usr/bin/env bash
# SFT of a LoRA adapter on Llama-2-7B, the teacher.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY llama2
default CKPT_NAME llama2-7b
default PEFT lora
default LR 1e-3
default EPOCH 10
default GRADIENT_CHECKPOINTING 1

sft "$@"
