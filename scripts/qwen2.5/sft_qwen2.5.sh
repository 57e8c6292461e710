#!/usr/bin/env bash
# SFT of Qwen2.5-0.5B, the baseline of its distillation.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY qwen2.5
default CKPT_NAME qwen2.5-0.5b
default LR 5e-5
default EPOCH 10

sft "$@"
