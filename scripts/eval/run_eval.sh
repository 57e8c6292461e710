#!/usr/bin/env bash
# Scores a model on every set and seed:  bash scripts/eval/run_eval.sh CKPT_PATH [EVAL_BATCH_SIZE] [OPTION...]
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

(($# >= 1)) || die "usage: bash scripts/eval/run_eval.sh CKPT_PATH [EVAL_BATCH_SIZE] [OPTION...]"
evaluate --model-path "$@"
