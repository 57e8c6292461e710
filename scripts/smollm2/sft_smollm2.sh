#!/usr/bin/env bash
# SFT of the depth-pruned SmolLM2, the baseline of its distillation.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY smollm2
default CKPT_NAME smollm2-12-layers
default LR 1e-3
default EPOCH 10

sft "$@"
