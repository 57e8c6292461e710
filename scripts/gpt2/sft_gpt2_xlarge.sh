#!/usr/bin/env bash
# SFT of GPT-2 xlarge, the teacher.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY gpt2
default CKPT_NAME gpt2-xlarge
default LR 5e-5
default BATCH_SIZE 2
default GRAD_ACC 4
default EPOCH 10

sft "$@"
