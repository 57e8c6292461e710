#!/usr/bin/env bash
# SFT of the depth-pruned SmolLM2 on what the fine-tuned SmolLM2-135M (sft_teacher_smollm2.sh) writes.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY smollm2
default CKPT_NAME smollm2-12-layers
default TEACHER_NAME smollm2-135m-instruct
default LR 1e-3
default EPOCH 10

seqkd "$@"
