# Makes .venv with everything that requirements.txt pins, once. Source it after common.sh; call set_up [EXTRA...].

# set_up [REQUIREMENT...]: the pinned requirements and these besides; nothing to do when they have not changed.
set_up() {
  local venv=$ROOT/.venv stamp wanted
  stamp=$venv/.installed
  wanted=$(cat "$ROOT/requirements.txt"; printf '%s\n' "$@")
  PYTHON=$venv/bin/python
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  local base=${BASE_PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$base is $("$base" --version); 3.11 or newer is needed"
  echo "== installing into .venv (once; a few minutes)"
  "$base" -m venv "$venv"
  # DeepSpeed compiles nothing here: what it would need is compiled at run time where it is used
  DS_BUILD_OPS=0 "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off --quiet -r "$ROOT/requirements.txt" "$@"
  printf '%s' "$wanted" >"$stamp"
}
