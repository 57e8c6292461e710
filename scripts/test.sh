#!/usr/bin/env bash
# Lints and tests on the CPU:  bash scripts/test.sh [--all | --everything] [PYTEST OPTION...]
# --all adds the long tests, --everything each combination of what they try one or two of; the longest, fuzzes of ten
# thousand tries, come with TENTHS=10, or as many tenths.
# Sets up what it needs in .venv by itself. One process for each core, eight at most; -n 0 runs them all in this one.
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
source "$ROOT/scripts/lib/setup.sh"

case ${1:-} in
  --all) which=(-m "not exhaustive"); shift ;;
  --everything) which=(); shift ;;
  *) which=(-m "not slow and not exhaustive") ;;
esac
set_up pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 ruff==0.17.6 psutil==7.2.2 py-cpuinfo==9.0.0 pyyaml==6.0.4 tokenizers==0.23.3 triton==3.7.1
cd "$ROOT"
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1
"$PYTHON" -m ruff check code tests benchmarks data examples
workers=$(cores)  # a test has one thread, and most of its time is one process that imports libraries
exec "$PYTHON" -m pytest -n "$((workers < 8 ? workers : 8))" --dist loadfile --no-loadscope-reorder ${which[@]+"${which[@]}"} "$@"
