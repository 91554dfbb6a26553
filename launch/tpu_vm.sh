#!/usr/bin/env bash
# Trains on a Cloud TPU of one host or many:
#
#   launch/tpu_vm.sh train --name=ilm --zone=ZONE --type=v5e-8 --spot --queue \
#     --config=configs/star.py:hard --workdir=gs://BUCKET/hard [--config.a.b=c ...]
#
# `train` makes the TPU, sets it up, starts the run, makes it all anew when the TPU was preempted, and deletes the TPU
# when the run has finished or failed. What it does can be had one by one; each action takes --name and --zone:
#
#   create  --type=TYPE [--spot] [--queue]          --queue: a queued resource, which waits for room
#   setup   [--repo=URL] [--ref=NAME]               the last commit here, or a repository's; Python and the packages
#   run     --config=... --workdir=gs://...         starts on all hosts, each under launch/resume.sh, and returns
#   logs    [--worker=0]                            follows the log of a host
#   stop                                            saves, and ends the run
#   delete  [--queue]                               ends the run without saving, and the cost
#
#   TYPE: v5e-N and v6e-N have N chips; v4-N and v5p-N have N TensorCores, two a chip
#   --project=NAME      gcloud's own without it          --keep     `train` does not delete the TPU
#   --max_restarts=100  of the processes, and of the TPU --poll=60  seconds between two looks of `train`
#   --dry_run           prints the commands, `train` those of one round
#
# Last really run: never: dry run only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

me=tpu_vm.sh dry_run='' action=${1:-}
case $action in
  train | create | setup | run | logs | stop | delete) shift ;;
  -h | --help) usage ;;
  *) fail "${action:-no action}: expected train, create, setup, run, logs, stop or delete first (see --help)" ;;
esac
name='' zone='' project='' type='' spot='' queue='' repo='' ref=HEAD worker=0
max_restarts=100 poll=60 keep='' config='' workdir='' flags=()
for arg in "$@"; do
  case $arg in
    -h | --help) usage ;;
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --project=*) project=${arg#*=} ;;
    --type=*) type=${arg#*=} ;;
    --repo=*) repo=${arg#*=} ;;
    --ref=*) ref=${arg#*=} ;;
    --worker=*) worker=${arg#*=} ;;
    --max_restarts=*) max_restarts=${arg#*=} ;;
    --poll=*) poll=${arg#*=} ;;
    --spot) spot=--spot ;;
    --queue) queue=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry_run=1 ;;
    --config=*) config=$arg flags+=("$arg") ;;
    --workdir=*) workdir=${arg#*=} flags+=("$arg") ;;
    --config.*=* | --mode=*) flags+=("$arg") ;;
    *) fail "$arg: unknown (see --help); flags are written --name=value" ;;
  esac
done
[ -n "$name" ] || fail '--name is missing: expected a name for the TPU, such as --name=ilm'
[ -n "$zone" ] || fail '--zone is missing: expected one that has such TPUs, such as --zone=us-west4-a'
whole --max_restarts "$max_restarts" --poll "$poll" --worker "$worker"

# Sets accelerator and runtime, the names that gcloud has for --type.
know_type() {
  local sizes size=${type#*-}
  case $type in
    v4-*) accelerator=$type runtime=tpu-ubuntu2204-base ;;
    v5e-*) accelerator=v5litepod-$size runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) accelerator=$type runtime=v2-alpha-tpuv5 ;;
    v6e-*) accelerator=$type runtime=v2-alpha-tpuv6e ;;
    '') fail '--type is missing: expected a TPU, such as --type=v5e-8' ;;
    *) fail "--type=$type: unknown; known are v4-N, v5e-N, v5p-N and v6e-N, such as v5e-8" ;;
  esac
  case $type in
    v5e-* | v6e-*)
      sizes=' 1 4 8 16 32 64 128 256 '
      [[ $sizes = *" $size "* ]] || fail "--type=$type: expected one of$sizes""chips"
      ;;
    *) [[ $size =~ ^[1-9][0-9]*$ && $((size % 8)) = 0 ]] || fail "--type=$type: expected a multiple of 8 TensorCores" ;;
  esac
}

case $action in create | train) know_type ;; esac
case $action in
  run | train)
    [ -n "$config" ] || fail '--config is missing: expected a file, such as --config=configs/star.py:hard'
    [[ $workdir = gs://?* ]] || fail "--workdir=$workdir: expected gs://BUCKET/FOLDER, for the disks go with the TPU"
    ;;
esac

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
tpu=(gcloud compute tpus tpu-vm)
queued=(gcloud compute tpus queued-resources)

# Run a command on a host, or on all.
on() { run "${tpu[@]}" ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

create() {
  local kind=(${spot:+"$spot"} --accelerator-type="$accelerator")
  if [ -z "$queue" ]; then
    run "${tpu[@]}" create "$name" "${where[@]}" "${kind[@]}" --version="$runtime"
    return
  fi
  run "${queued[@]}" create "$name" "${where[@]}" --node-id="$name" "${kind[@]}" --runtime-version="$runtime" || return
  local look=("${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)') state
  if [ -n "$dry_run" ]; then
    quoted "${look[@]}"
    return
  fi
  while state=$("${look[@]}"); do
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND*) say "the queued resource is $state" && return 1 ;;
    esac
    sleep "$poll"
  done
  return 1
}

setup() {
  local from=$repo bundle=${TMPDIR:-/tmp}/ilm_jax-$name.bundle steps
  if [ -z "$from" ]; then
    git diff --quiet HEAD || say 'what is not committed stays behind'
    run git bundle create --quiet "$bundle" "$ref" || return
    run "${tpu[@]}" scp "$bundle" "$name:ilm_jax.bundle" "${where[@]}" --worker=all || return
    from=../ilm_jax.bundle
  fi
  steps="git init --quiet ilm_jax && cd ilm_jax && git fetch --quiet $(quoted "$from" "$ref")"
  steps+=' && git checkout --quiet --force --detach FETCH_HEAD'
  steps+=' && python3 -m pip install --quiet --user uv' # the hosts have Python 3.10; uv brings a newer one
  steps+=' && python3 -m uv venv --quiet --allow-existing --python=3.12 .venv'
  steps+=" && python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu,gcs]'"
  on all "$steps"
}

# shellcheck disable=SC2016 # the host is to expand it
pid='$(cat ilm_jax.pid 2> /dev/null)'
alive="[ ! -e ilm_jax.exit ] && kill -0 $pid 2> /dev/null"
start() {
  local command steps
  # With the platforms named, JAX refuses to start without a TPU; else it would train on the CPU.
  # The pause: a host comes back after the others have noticed that it was gone, which takes them a minute at most.
  command=$(quoted launch/resume.sh --max_restarts="$max_restarts" --pause=60 --result=../ilm_jax.exit \
    -- env JAX_PLATFORMS=tpu,cpu .venv/bin/python -m ilm_jax.main "${flags[@]}")
  steps="if $alive; then echo 'a run is going on: stop it first' >&2; exit 1; fi"
  steps+="; rm -f ilm_jax.exit && cd ilm_jax && { setsid $command >> ../ilm_jax.log 2>&1 < /dev/null & }"
  steps+=' && echo $! > ../ilm_jax.pid'
  on all "$steps"
}

delete() {
  if [ -n "$queue" ]; then
    run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
  fi
}

# Print how it stands: gone (there is no TPU), busy (it comes or goes), unknown (gcloud failed, and said why), idle,
# running, or the exit code of the run.
look=("${tpu[@]}" describe "$name" "${where[@]}" --format='value(state)')
ask="if $alive; then echo running; else cat ilm_jax.exit 2> /dev/null || echo idle; fi"
status() {
  local state
  state=$("${look[@]}" 2>&1) || state="error: $state"
  case $state in
    READY) on 0 "$ask" || echo unknown ;;
    PREEMPTED | TERMINATED | STOPPED | error:*NOT_FOUND*) echo gone ;;
    error:*) echo "$state" >&2 && echo unknown ;;
    *) echo busy ;;
  esac
}

# Make sure that there is a TPU, and that the run goes on there; $1 is how it stands.
bring_up() {
  if [ "$1" = gone ]; then
    delete 2> /dev/null || true # what is left of one that was preempted
    create || return
  fi
  setup && start
}

train() {
  if [ -n "$dry_run" ]; then
    create && setup && start && quoted "${look[@]}" && on 0 "$ask"
    [ -n "$keep" ] || delete
    return
  fi
  trap 'say "the run goes on, and the TPU costs: train follows it again; stop saves and ends it, delete ends the cost"
    exit 130' INT
  local starts=0 failures=0 now result=0
  while [ "$failures" -lt 3 ]; do
    now=$(status)
    [ "$starts$now" != 0unknown ] || fail 'gcloud failed, see above: nothing was made or deleted'
    [ "$starts$now" != 0running ] || starts=1
    case $now in
      running | busy | unknown) sleep "$poll" && continue ;;
      gone | idle | 75 | 143) ;; # preempted; just made, or crashed; preempted and saved; rebooted
      *) [ "$starts" = 0 ] || break ;;
    esac
    [ "$starts" -le "$max_restarts" ] || break
    [ "$starts" = 0 ] || say "the run was preempted ($now): starting it again ($starts of $max_restarts)"
    if bring_up "$now"; then
      starts=$((starts + 1)) failures=0
    else
      failures=$((failures + 1))
    fi
    sleep "$poll"
  done
  if [ "$now" = 0 ]; then
    say 'finished'
  else
    result=1
    on 0 'tail -n 30 ilm_jax.log' || true
    say "ended ($now): mend what the lines above say, then give the same command again"
  fi
  if [ -n "$keep" ]; then say 'the TPU is kept, and costs until: launch/tpu_vm.sh delete'; else delete || true; fi
  return "$result"
}

case $action in
  run) start && say 'started: see logs; delete the TPU when it is done, it costs until then' ;;
  logs) on "$worker" 'tail -n 100 -F ilm_jax.log' ;;
  stop) on all "kill -TERM $pid" ;;
  *) "$action" ;;
esac
