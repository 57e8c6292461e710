#!/usr/bin/env bash
# SFT of a LoRA adapter on OLMo-2-1B on what OLMo-2-7B with its adapter (sft_teacher_olmo2.sh) writes.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY olmo2
default CKPT_NAME olmo2-1b
default TEACHER_FAMILY olmo2
default TEACHER_NAME olmo2-7b
default TEACHER_PEFT lora
default PEFT lora
default LR 1e-3
default EPOCH 10

seqkd "$@"
