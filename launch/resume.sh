#!/usr/bin/env bash
# Runs a command, and restarts it after each preemption or crash until it finishes:
#
#   launch/resume.sh [flags] -- python -m ilm_jax.main --config=configs/star.py:hard --workdir=gs://BUCKET/hard
#
#   --max_restarts=100  number of restarts before giving up
#   --pause=10          seconds to wait before a restart. If several hosts run this script, wait longer than the other
#                       hosts need to notice a lost process (--config.distributed.heartbeat_timeout)
#   --stop_on=CODE      exit with CODE instead of restarting after it; use 75 if a scheduler restarts preempted jobs
#   --result=FILE       write the final exit code into FILE
#   --dry_run           print the command without running it
#
# The command is restarted after exit code 75 (preempted, state saved) and 128 + n (killed by signal n). It is not
# restarted after 0 (finished), 130 (Ctrl-C, state saved), 141 (the reader of its output has ended) or any other code
# (an error), nor if it ended within a minute of its start five times in a row. SIGTERM, SIGHUP (sent on as SIGTERM)
# and Ctrl-C are forwarded to the command, which is then not restarted. The exit code of this script is that of the
# last run of the command.
# Last real run: only in tests/launch/restarts_test.py, with fake commands.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
. "$launch/common.sh"

script=resume.sh dry_run='' max_restarts=100 pause=10 stop_on=0 result=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) cd "$launch/.." && usage ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --stop_on=*) stop_on=${1#*=} ;;
    --result=*) result=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) break ;;
    *) fail "$1: unknown flag; expected --max_restarts=, --pause=, --stop_on=, --result=, --dry_run or -- COMMAND" ;;
  esac
  shift
done
require_whole_numbers --max_restarts "$max_restarts" --pause "$pause" --stop_on "$stop_on"
[ $# -gt 1 ] || fail 'the command is missing: expected it after --, such as -- python -m ilm_jax.main --config=...'
shift
if [ -n "$dry_run" ]; then
  print_command "$@"
  exit 0
fi

# Print what an exit code of the command means.
describe_exit() {
  case $1 in
    75) echo 'preempted, state saved' ;;
    130) echo 'stopped by Ctrl-C, state saved' ;;
    134) echo 'aborted: lost contact with another process, or the runtime failed (see the log above)' ;;
    137) echo 'killed by SIGKILL: often out of memory (look at dmesg)' ;;
    139) echo 'segmentation fault' ;;
    141) echo 'the reader of its standard output has closed the pipe' ;;
    143) echo 'killed by SIGTERM before it could save' ;;
    *) if is_restartable "$1"; then echo "killed by signal $(($1 - 128))"; else echo 'error (see the log above)'; fi ;;
  esac
}

is_restartable() { [ "$1" = 75 ] || { [ "$1" -gt 128 ] && [ "$1" -le 192 ] && [ "$1" != 130 ] && [ "$1" != 141 ]; }; }

[ -z "$result" ] || trap 'echo "$?" > "$result.part" && mv "$result.part" "$result"' EXIT
# Run the command in a process group of its own. Ctrl-C, which a terminal sends to the whole foreground group, then
# reaches the command only once, through forward_signal.
set -m
child='' signals='' # signals: names of the signals received so far, in order
forward_signal() {
  signals+=" $1"
  [ -z "$child" ] || kill -s "$1" "$child" 2> /dev/null || true
}
trap 'forward_signal TERM' TERM HUP
trap 'forward_signal INT' INT

# Wait until the child has ended, and set `status` to its exit code. `wait` returns early if this script receives a
# signal or if the child is suspended (by signal 19 or 20), so call it until the child has ended and no signal arrived
# in the meantime. `wait -f` would ignore suspensions, but it can hang in bash 5.2.
wait_for_child() {
  local seen=none
  until [ "$seen" = "$signals" ] && ! kill -0 "$child" 2> /dev/null; do
    seen=$signals status=0
    wait "$child" 2> /dev/null || status=$?
    case $status in $((128 + 19)) | $((128 + 20))) sleep 0.2 ;; esac
  done
  child=''
}

restarts=0 early_exits=0
while :; do
  started=$SECONDS
  "$@" &
  child=$!
  # Forward a signal that arrived before `child` was set.
  [ -z "$signals" ] || kill -s "${signals##* }" "$child" 2> /dev/null || true
  wait_for_child
  code=$status
  reason="exit code $code: $(describe_exit "$code")"
  [ "$code" != 0 ] || exit 0
  if [ -n "$signals" ]; then
    log "stopped by a signal; $reason"
    exit "$code"
  fi
  [ "$code" != "$stop_on" ] || exit "$code"
  if ! is_restartable "$code"; then
    advice='fix the error, then run the same command again'
    [ "$code" != 130 ] || advice='run the same command again to continue'
    log "$reason; not restarting: $advice"
    exit "$code"
  fi
  if [ $((SECONDS - started)) -lt 60 ]; then early_exits=$((early_exits + 1)); else early_exits=0; fi
  if [ "$early_exits" -ge 5 ]; then
    log "$reason; not restarting: the command ended within a minute of its start $early_exits times in a row"
    exit "$code"
  fi
  if [ "$restarts" -ge "$max_restarts" ]; then
    log "$reason; not restarting: the limit of $max_restarts restarts is reached (--max_restarts)"
    exit "$code"
  fi
  restarts=$((restarts + 1))
  log "$reason; restarting in $pause s (restart $restarts of $max_restarts)"
  sleep "$pause" &
  child=$!
  wait_for_child
  [ -z "$signals" ] || exit "$code"
done
