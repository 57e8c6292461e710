#!/usr/bin/env bash
# Scores a LoRA adapter:  bash scripts/eval/run_eval_lora.sh LORA_ADAPTER_PATH [EVAL_BATCH_SIZE] [OPTION...]
# Its base model is the one that the adapter names, or MODEL_PATH.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

(($# >= 1)) || die "usage: bash scripts/eval/run_eval_lora.sh LORA_ADAPTER_PATH [EVAL_BATCH_SIZE] [OPTION...]"
evaluate --peft-path "$@"
