#!/usr/bin/env bash
# SFT of GPT-2 base, the baseline of its distillation.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY gpt2
default CKPT_NAME gpt2-base

sft "$@"
