#!/usr/bin/env bash
# SFT of a LoRA adapter on Gemma-3-1B on what Gemma-3-4B with its adapter (sft_teacher_gemma3.sh) writes.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY gemma3
default CKPT_NAME gemma3-1b
default TEACHER_FAMILY gemma3
default TEACHER_NAME gemma3-4b
default TEACHER_PEFT lora
default PEFT lora
default LR 1e-3
default EPOCH 10

seqkd "$@"
