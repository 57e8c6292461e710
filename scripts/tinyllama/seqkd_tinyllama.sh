#!/usr/bin/env bash
# SFT of a LoRA adapter on TinyLlama-1.1B on what Llama-2-7B with its adapter (sft_teacher_llama2.sh) writes.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY tinyllama
default CKPT_NAME tinyllama-1.1b
default TEACHER_FAMILY llama2
default TEACHER_NAME llama2-7b
default TEACHER_PEFT lora
default PEFT lora
default LR 1e-3
default EPOCH 10

seqkd "$@"
