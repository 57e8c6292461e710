#!/usr/bin/env bash
# Distils Qwen2.5-7B with its adapter (sft_teacher_qwen2.5.sh) into Qwen2.5-0.5B.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default KD_OBJ ToDi
default FAMILY qwen2.5
default CKPT_NAME qwen2.5-0.5b
default TEACHER_NAME qwen2.5-7b
default TEACHER_MODEL_PATH model_hub/qwen2.5/qwen2.5-7b
default TEACHER_PEFT_PATH "$(best_checkpoint outputs/qwen2.5/qwen2.5-7b/sft)"
default LR 5e-5
default BATCH_SIZE 4
default GRAD_ACC 2
default EPOCH 10
default KD_RATE 0.5
default KD_TEMP 2.0

distil "$@"
