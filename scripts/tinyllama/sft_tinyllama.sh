#!/usr/bin/env bash
# SFT of a LoRA adapter on TinyLlama-1.1B, the baseline of its distillation.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY tinyllama
default CKPT_NAME tinyllama-1.1b
default PEFT lora
default LR 1e-3
default EPOCH 10

sft "$@"
