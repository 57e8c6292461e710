#!/usr/bin/env bash
# Distils Gemma-3-4B with its adapter (sft_teacher_gemma3.sh) into a LoRA adapter on Gemma-3-1B.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default KD_OBJ ToDi
default FAMILY gemma3
default CKPT_NAME gemma3-1b
default TEACHER_NAME gemma3-4b
default TEACHER_MODEL_PATH model_hub/gemma3/gemma3-4b
default TEACHER_PEFT_PATH "$(best_checkpoint outputs/gemma3/gemma3-4b/sft)"
default PEFT lora
default LR 1e-3
default EPOCH 10
default KD_RATE 0.5
default KD_TEMP 2.0

distil "$@"
