#!/usr/bin/env bash
# Distils OLMo-2-7B with its adapter (sft_teacher_olmo2.sh) into a LoRA adapter on OLMo-2-1B.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default KD_OBJ ToDi
default FAMILY olmo2
default CKPT_NAME olmo2-1b
default TEACHER_NAME olmo2-7b
default TEACHER_MODEL_PATH model_hub/olmo2/olmo2-7b
default TEACHER_PEFT_PATH "$(best_checkpoint outputs/olmo2/olmo2-7b/sft)"
default PEFT lora
default LR 1e-3
default EPOCH 10
default KD_RATE 0.5
default KD_TEMP 2.0

distil "$@"
