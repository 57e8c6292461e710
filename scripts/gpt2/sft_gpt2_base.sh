#!/usr/bin/env bash
# SFT of GPT-2 base, the baseline of its distillation.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY gpt2
default CKPT_NAME gpt2-base
default LR 5e-4
default BATCH_SIZE 4
default GRAD_ACC 2
default EPOCH 20

sft "$@"
