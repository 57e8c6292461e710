#!/usr/bin/env bash
# Distils the fine-tuned SmolLM2-135M (sft_teacher_smollm2.sh) into its depth-pruned copy.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY smollm2
default CKPT_NAME smollm2-12-layers
default TEACHER_NAME smollm2-135m-instruct
default LR 1e-3
default EPOCH 10

distil "$@"
