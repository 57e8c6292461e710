#!/usr/bin/env bash
# Makes sets from their public sources:  bash scripts/data/prepare.sh dolly self-inst vicuna sinst/11_ uinst/11_
# Lengths are counted in tokens of model_hub/gpt2/gpt2-base (scripts/models/fetch.sh), as published, or of TOKENIZER
# RAW_DIR=downloads takes files that you have; LIMIT SEED SETS_DIR; PLUGINS=my_sets.py runs a Python file first
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

cd "$ROOT"
sets_dir=${SETS_DIR:-${DATA_DIR:-}}  # an older name
export DS_ACCELERATOR=cpu  # works on the CPU; DeepSpeed need not look for a GPU and warn
exec "$PYTHON" -m todi.data.prepare "$@" ${RAW_DIR:+--raw-dir "$RAW_DIR"} ${sets_dir:+--sets-dir "$sets_dir"} \
  ${TOKENIZER:+--tokenizer "$TOKENIZER"} ${LIMIT:+--limit "$LIMIT"} ${SEED:+--seed "$SEED"} \
  ${PLUGINS:+--plugins $PLUGINS}
