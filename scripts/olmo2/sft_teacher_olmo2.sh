#!/usr/bin/env bash
# SFT of a LoRA adapter on OLMo-2-7B, the teacher.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY olmo2
default CKPT_NAME olmo2-7b
default PEFT lora
default LR 1e-3
default EPOCH 10

sft "$@"
