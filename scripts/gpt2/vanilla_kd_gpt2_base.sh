#!/usr/bin/env bash
# Distils the fine-tuned GPT-2 xlarge (sft_gpt2_xlarge.sh) into GPT-2 base.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default KD_OBJ ToDi
default FAMILY gpt2
default CKPT_NAME gpt2-base
default TEACHER_NAME gpt2-xlarge
default LR 5e-4
default BATCH_SIZE 4
default GRAD_ACC 2
default EPOCH 20
default KD_RATE 0.5
default KD_TEMP 2.0

distil "$@"
