#!/usr/bin/env bash
# Starts a command again after each preemption or crash, until it has finished:
#
#   launch/resume.sh [flags] -- python -m ilm_jax.main --config=configs/star.py:hard --workdir=gs://BUCKET/hard
#
#   --max_restarts=100  then it gives up
#   --pause=10          seconds before a restart; where each of several hosts has a loop of its own, longer than the
#                       others need to notice that one is gone
#   --stop_on=CODE      an exit code that is handed on instead: 75 where a scheduler starts the job again
#   --result=FILE       gets the exit code, at the end
#   --dry_run           print the command
#
# Started again: 75 (preempted, and saved) and 128 + n (killed by signal n). Not: 0 (finished), 130 (Ctrl-C, and saved),
# 1 and all others (an error); nor what died within a minute of its start, five times in a row. SIGTERM, SIGHUP (as
# SIGTERM) and Ctrl-C are passed on to the command, and are the end: its exit code is the exit code here.
# Last really run: by tests/launch_test.py, with stubs for the command.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
. "$launch/common.sh"

me=resume.sh dry_run='' max_restarts=100 pause=10 stop_on=0 result=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) cd "$launch/.." && usage ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --stop_on=*) stop_on=${1#*=} ;;
    --result=*) result=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) break ;;
    *) fail "$1: expected --max_restarts=, --pause=, --stop_on=, --result= or --dry_run, then -- and the command" ;;
  esac
  shift
done
whole --max_restarts "$max_restarts" --pause "$pause" --stop_on "$stop_on"
[ $# -gt 1 ] || fail 'no command: expected -- and the command, such as -- python -m ilm_jax.main --config=...'
shift
if [ -n "$dry_run" ]; then
  quoted "$@"
  exit 0
fi

cause() {
  case $1 in
    75) echo 'preempted, and saved' ;;
    130) echo 'stopped by Ctrl-C, and saved' ;;
    134) echo 'aborted: another host died or stopped answering (all start again), or the runtime failed (see above)' ;;
    137) echo 'killed: out of memory (dmesg says so), or from outside' ;;
    139) echo 'crashed: segmentation fault' ;;
    143) echo 'terminated before it could save' ;;
    *) if restarts_on "$1"; then echo "killed by signal $(($1 - 128))"; else echo 'an error, named above'; fi ;;
  esac
}

restarts_on() { [ "$1" = 75 ] || { [ "$1" -gt 128 ] && [ "$1" -le 192 ] && [ "$1" != 130 ]; }; }

[ -z "$result" ] || trap 'echo "$?" > "$result.part" && mv "$result.part" "$result"' EXIT
set -m # the command gets a process group of its own: a Ctrl-C reaches it through pass_on only, once
child='' told='' # told: the signals that came, in order
pass_on() {
  told+=" $1"
  [ -z "$child" ] || kill -s "$1" "$child" 2> /dev/null || true
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

# Wait for the child's end; its exit code goes to `status`. A signal cuts `wait` short, and so does a child that is
# suspended (19 and 20 stop it). `wait -f` would not be, but it can hang (bash 5.2).
await() {
  local heard=none
  until [ "$heard" = "$told" ] && ! kill -0 "$child" 2> /dev/null; do
    heard=$told status=0
    wait "$child" 2> /dev/null || status=$?
    case $status in $((128 + 19)) | $((128 + 20))) sleep 0.2 ;; esac
  done
  child=''
}

restarts=0 quick=0
while :; do
  began=$SECONDS
  "$@" &
  child=$!
  [ -z "$told" ] || kill -s "${told##* }" "$child" 2> /dev/null || true # it came before there was a child
  await
  code=$status
  why="exit code $code: $(cause "$code")"
  [ "$code" != 0 ] || exit 0
  if [ -n "$told" ]; then
    say "told to stop; $why"
    exit "$code"
  fi
  [ "$code" != "$stop_on" ] || exit "$code"
  if ! restarts_on "$code"; then
    next='mend it, then give the same command again'
    [ "$code" != 130 ] || next='the same command goes on'
    say "$why: not restarted; $next"
    exit "$code"
  fi
  if [ $((SECONDS - began)) -lt 60 ]; then quick=$((quick + 1)); else quick=0; fi
  if [ "$quick" -ge 5 ]; then
    say "$why: not restarted: it ended within a minute of its start $quick times in a row"
    exit "$code"
  fi
  if [ "$restarts" -ge "$max_restarts" ]; then
    say "$why: not restarted, for it was $restarts times (--max_restarts)"
    exit "$code"
  fi
  restarts=$((restarts + 1))
  say "$why: restarting in $pause s ($restarts of $max_restarts)"
  sleep "$pause" &
  child=$!
  await
  [ -z "$told" ] || exit "$code"
done
