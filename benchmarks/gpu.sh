#!/usr/bin/env bash
# What is measured on a GPU, in one table:  bash benchmarks/gpu.sh [OPTION OF benchmarks/gpu.py...]
# First whether the kernels say what their twins say, on this GPU; then speed and memory. Installs Liger-Kernel, to have
# it beside the loss, into an environment of its own. Not run on a GPU yet.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/common.sh"

cd "$ROOT"
compared=$(mktemp -d)
trap 'rm -rf "$compared"' EXIT
"$PYTHON" -m venv --system-site-packages "$compared"
packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$("$compared/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
"$compared/bin/python" -m pip install --quiet liger-kernel || echo "without Liger-Kernel beside it"
"$PYTHON" -m pytest -q tests/test_divergences.py tests/test_linear_loss.py
"$compared/bin/python" benchmarks/gpu.py "$@"
