#!/usr/bin/env bash
# SFT of a LoRA adapter on Qwen2.5-7B, the teacher.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY qwen2.5
default CKPT_NAME qwen2.5-7b
default PEFT lora
default LR 1e-3
default EPOCH 10

sft "$@"
