#!/usr/bin/env bash
# Makes the 12-layer student: the layers of SmolLM2-135M whose loss hurts most, and some between them.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

default KEEP_LAYERS "0 1 2 5 8 11 14 17 20 23 24 29"
default MODEL_PATH model_hub/smollm2/smollm2-135m-instruct
default SAVE_DIR model_hub/smollm2/smollm2-12-layers

cd "$ROOT"
export DS_ACCELERATOR=cpu  # works on the CPU; DeepSpeed need not look for a GPU and warn
read -ra layers <<<"$KEEP_LAYERS"
"$PYTHON" -m todi.models.prune --model-path "$MODEL_PATH" --keep-layers "${layers[@]}" --save-dir "$SAVE_DIR" "$@"
