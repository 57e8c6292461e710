#!/usr/bin/env bash
# Brings a model into model_hub/:  bash scripts/models/fetch.sh NAME [--source hub]
# PLUGINS=my_family.py runs a Python file first, which may register models
source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

cd "$ROOT"
export DS_ACCELERATOR=cpu  # works on the CPU; DeepSpeed need not look for a GPU and warn
exec "$PYTHON" -m todi.models.fetch "$@" ${PLUGINS:+--plugins $PLUGINS}
