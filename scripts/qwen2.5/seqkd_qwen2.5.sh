#!/usr/bin/env bash
# SFT of Qwen2.5-0.5B on what Qwen2.5-7B with its adapter (sft_teacher_qwen2.5.sh) writes.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY qwen2.5
default CKPT_NAME qwen2.5-0.5b
default TEACHER_FAMILY qwen2.5
default TEACHER_NAME qwen2.5-7b
default TEACHER_PEFT lora
default LR 5e-5
default EPOCH 10

seqkd "$@"
