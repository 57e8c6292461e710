#!/usr/bin/env bash
# Scores a model on every set and seed:  bash scripts/eval/run_eval.sh CKPT_PATH [EVAL_BATCH_SIZE]
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

(($# >= 1)) || die "usage: bash scripts/eval/run_eval.sh CKPT_PATH [EVAL_BATCH_SIZE]"
evaluate --model-path "$1" ${2:+--batch-size "$2"} "${@:3}"
