#!/usr/bin/env bash
# SFT of GPT-2 base on what the fine-tuned GPT-2 xlarge (sft_gpt2_xlarge.sh) writes.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY gpt2
default CKPT_NAME gpt2-base
default TEACHER_NAME gpt2-xlarge

seqkd "$@"
