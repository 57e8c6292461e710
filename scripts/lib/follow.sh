#!/usr/bin/env bash
# Runs a command that a machine far away looks after (hostfile.sh):  bash scripts/lib/follow.sh COMMAND...
# The first line of its input has variables for the command, each one after it the name of a signal; where the input ends,
# so does the command, by TERM.
set -uo pipefail

IFS= read -r variables || exit
eval "export $variables"

set -m  # a process group of its own, and signals that it can heed
"$@" </dev/null &
command=$!
set +m
exec 3<&0
{
  while read -r name <&3; do kill "-$name" "$command" 2>/dev/null; done
  kill -TERM "$command" 2>/dev/null
} &
reader=$!
status=0
wait "$command" || status=$?
kill "$reader" 2>/dev/null
exit "$status"
