#!/usr/bin/env bash
# SFT of SmolLM2-135M-Instruct, the teacher of the quickstart.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default FAMILY smollm2
default CKPT_NAME smollm2-135m-instruct
default LR 3e-4
default EPOCH 3

sft "$@"
