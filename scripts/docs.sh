#!/usr/bin/env bash
# Builds docs/ as a site into build/site; a link that leads nowhere ends it:  bash scripts/docs.sh
# mkdocs has an environment of its own, so that it needs no torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=build/docs-venv
if [[ ! -x $venv/bin/mkdocs ]]; then
  "${BASE_PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet mkdocs-material==9.8.2
fi
NO_MKDOCS_2_WARNING=1 exec "$venv/bin/mkdocs" build --strict
