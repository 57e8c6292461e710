#!/usr/bin/env bash
# Distils Llama-2-7B with its adapter (sft_teacher_llama2.sh) into a LoRA adapter on TinyLlama-1.1B.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default KD_OBJ ToDi
default FAMILY tinyllama
default CKPT_NAME tinyllama-1.1b
default TEACHER_NAME llama2-7b
default TEACHER_MODEL_TYPE llama2
default TEACHER_MODEL_PATH model_hub/llama2/llama2-7b
default TEACHER_PEFT_PATH "$(best_checkpoint outputs/llama2/llama2-7b/sft)"
default PEFT lora
default LR 1e-3
default EPOCH 10
default KD_RATE 0.5
default KD_TEMP 2.0

distil "$@"
