#!/usr/bin/env bash
# Runs any launcher on all hosts of a hostfile, over ssh:
#
#   bash scripts/hostfile.sh HOSTFILE scripts/gpt2/vanilla_kd_gpt2_base.sh [WORD...]
#
# A line of the file is a host and how many processes it takes, `node1 slots=8`, as DeepSpeed and Open MPI have it. The
# repository must be at the same path on all hosts. Settings, and variables of libraries (NCCL_*, HF_*, ...), are handed
# on; output has the host before each line. A launcher that fails ends the others, its exit code is handed on, and so are
# TERM, INT and USR1. Where this script is killed, or a connection breaks, the launchers end by TERM.
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
set +a

default SSH "ssh -o BatchMode=yes -o ServerAliveInterval=15"
PATIENCE=5  # seconds that others have to end by themselves, so that each says its own
hosts=() slots=() pids=() words=() received=0

# read_hosts FILE: sets `hosts` and `slots`.
read_hosts() {
  local line pattern='^([^[:space:]]+)([[:space:]]+slots=([1-9][0-9]*)([[:space:]]+max[_-]slots=[0-9]+)?)?$'
  while IFS= read -r line || [[ -n $line ]]; do
    line=$(sed -e 's/#.*//' -e 's/^[[:space:]]*//' -e 's/[[:space:]]*$//' <<<"$line")
    [[ -n $line ]] || continue
    [[ $line =~ $pattern ]] || die "a line of $1 must be HOST or HOST slots=N, got $line"
    hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[3]:-1}")
  done <"$1"
  ((${#hosts[@]} > 0)) || die "$1 names no host"
}

# read_variables: sets `variables`: NAME=VALUE, on one line and quoted for bash, of what the launchers there must have.
read_variables() {
  variables=$(cd "$ROOT" && "$PYTHON" -m todi.elsewhere)
  eval "words=($variables)"  # they are quoted for a shell, and may have line breaks
  variables=$(printf '%q ' ${words[@]+"${words[@]}"} "NNODES=${#hosts[@]}")
}

# start NUMBER WORD...: the launcher on this host, run by follow.sh, which reads variables and signals from file
# descriptor 20 + NUMBER: on a command line others could read them.
start() {
  local number=$1 fifo=$folder/$1 command other
  command="cd $(printf %q "$ROOT") && exec bash scripts/lib/follow.sh bash $(printf '%q ' "${@:2}")"
  mkfifo "$fifo"
  (
    for ((other = 0; other < number; other++)); do eval "exec $((20 + other))>&-"; done  # they would stay open with it
    # shellcheck disable=SC2086
    $SSH "${hosts[number]}" "$command" <"$fifo" 2>&1 | prefixed "${hosts[number]}"
  ) &
  pids+=($!)
  eval "exec $((20 + number))>$(printf %q "$fifo")"
  tell "$number" "$variables NODE_RANK=$number"
}

prefixed() { local line; while IFS= read -r line; do printf '[%s] %s\n' "$1" "$line"; done; }

# tell NUMBER LINE: to follow.sh there, if it still runs.
tell() { { printf '%s\n' "$2" >&$((20 + $1)); } 2>/dev/null || true; }

# tell_all NAME: the signal, to all launchers.
tell_all() { local number; for ((number = 0; number < ${#hosts[@]}; number++)); do tell "$number" "$1"; done; }

# wait_for_all: until all have ended; the exit code is that of the first that failed, or 0.
wait_for_all() {
  local number pid code status=0 running=${#pids[@]} seconds=0
  while ((running > 0)); do
    sleep 1 || true
    for ((number = 0; number < ${#pids[@]}; number++)); do
      pid=${pids[number]}
      if [[ -z $pid ]] || kill -0 "$pid" 2>/dev/null; then continue; fi
      code=0
      wait "$pid" || code=$?
      pids[number]= running=$((running - 1))
      echo "[${hosts[number]}] ended with exit code $code"
      ((status > 0)) || status=$code
    done
    if ((status > 0 && running > 0 && received == 0 && seconds++ == PATIENCE)); then tell_all TERM; fi
  done
  return "$status"
}

(($# >= 2)) && [[ -f $1 && -f $2 ]] || die "usage: bash scripts/hostfile.sh HOSTFILE LAUNCHER [WORD...], both files; got $*"
read_hosts "$1"
[[ $(tr ' ' '\n' <<<"${slots[*]}" | sort -u | grep -c .) == 1 ]] ||
  die "all hosts must have as many slots; $1 has ${slots[*]}"
unset NNODES NODE_RANK
default NPROC "${slots[0]}"
default MASTER_ADDR "${hosts[0]#*@}"
default MASTER_PORT 29500
default RENDEZVOUS_ID "$(uname -n)-$$-$(date +%s)"
read_variables
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for name in TERM INT USR1 HUP; do
  # shellcheck disable=SC2064
  trap "received=$(kill -l $name); tell_all $name" $name
done
launcher=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
for ((number = 0; number < ${#hosts[@]} && received == 0; number++)); do start "$number" "$launcher" "${@:3}"; done
trap '' PIPE  # to one that has ended there is nothing to tell
status=0
wait_for_all || status=$?
exit "$status"
