#!/usr/bin/env bash
# Trains on a Cloud TPU with one host or several:
#
#   launch/tpu_vm.sh train --name=ilm --zone=ZONE --type=v5e-8 --spot --queue \
#     --config=configs/star.py:hard --workdir=gs://BUCKET/hard [--config.a.b=c ...]
#
# `train` creates the TPU, installs the code, starts the run, repeats these steps if the TPU is preempted, and
# deletes the TPU when the run has finished or failed. The other actions do single steps. Every action needs --name
# and --zone:
#
#   create  --type=TYPE [--spot] [--queue]    create the TPU; --queue requests it as a queued resource, which waits
#                                             until a TPU is available
#   setup   [--repo=URL] [--ref=NAME]         install Python, the packages and the code on all hosts: the last commit,
#                                             or the branch, tag or commit NAME, of this checkout or of URL
#   run     --config=... --workdir=gs://...   start training on all hosts, under launch/resume.sh, and return
#   logs    [--worker=0]                      follow the log of one host
#   stop                                      save a checkpoint and end the run
#   delete  [--queue]                         delete the TPU without saving, which ends its costs
#
#   TYPE                v5e-N or v6e-N with N chips; v4-N or v5p-N with N TensorCores, two per chip
#   --project=NAME      Google Cloud project; default: the current project of gcloud
#   --keep              `train` does not delete the TPU at the end
#   --max_restarts=100  maximum number of restarts of the processes, and also of new TPUs after preemptions
#   --poll=60           seconds between two status checks of `train`
#   --dry_run           print the commands without running them; for `train`, as if there were no preemption
#
# Last real run: never, only dry runs and tests with a fake gcloud.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

script=tpu_vm.sh dry_run='' action=${1:-}
case $action in
  train | create | setup | run | logs | stop | delete) shift ;;
  -h | --help) usage ;;
  *) fail "${action:-no action}: expected train, create, setup, run, logs, stop or delete (see --help)" ;;
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
    *) fail "$arg: unknown flag (see --help); flags must be written --name=value" ;;
  esac
done
[ -n "$name" ] || fail '--name is missing: expected a name for the TPU, such as --name=ilm'
[ -n "$zone" ] || fail '--zone is missing: expected a zone with TPUs, such as --zone=us-west4-a'
require_whole_numbers --max_restarts "$max_restarts" --poll "$poll" --worker "$worker"

# Check --type, and set `accelerator` and `runtime` to its accelerator type and software version in gcloud.
parse_type() {
  local sizes size=${type#*-}
  case $type in
    v4-*) accelerator=$type runtime=tpu-ubuntu2204-base ;;
    v5e-*) accelerator=v5litepod-$size runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) accelerator=$type runtime=v2-alpha-tpuv5 ;;
    v6e-*) accelerator=$type runtime=v2-alpha-tpuv6e ;;
    '') fail '--type is missing: expected a TPU type, such as --type=v5e-8' ;;
    *) fail "--type=$type: unknown TPU type; expected v4-N, v5e-N, v5p-N or v6e-N, such as v5e-8" ;;
  esac
  case $type in
    v5e-* | v6e-*)
      sizes=' 1 4 8 16 32 64 128 256 '
      [[ $sizes = *" $size "* ]] || fail "--type=$type: expected one of$sizes""chips"
      ;;
    *) [[ $size =~ ^[1-9][0-9]*$ && $((size % 8)) = 0 ]] || fail "--type=$type: expected a multiple of 8 TensorCores" ;;
  esac
}

case $action in create | train) parse_type ;; esac
case $action in
  run | train)
    [ -n "$config" ] || fail '--config is missing: expected a config file, such as --config=configs/star.py:hard'
    [[ $workdir = gs://?* ]] \
      || fail "--workdir=$workdir: expected gs://BUCKET/FOLDER, because the disks are deleted with the TPU"
    ;;
esac

location=(--zone="$zone")
[ -z "$project" ] || location+=(--project="$project")
tpu=(gcloud compute tpus tpu-vm)
queued=(gcloud compute tpus queued-resources)

# Run a shell command on the TPU's hosts. Arguments: HOST_INDEX_OR_all COMMAND
run_on() { run "${tpu[@]}" ssh "$name" "${location[@]}" --worker="$1" --command="$2"; }

# Create the TPU. With --queue, request it as a queued resource and wait until it is active.
create() {
  local kind=(${spot:+"$spot"} --accelerator-type="$accelerator")
  if [ -z "$queue" ]; then
    run "${tpu[@]}" create "$name" "${location[@]}" "${kind[@]}" --version="$runtime"
    return
  fi
  run "${queued[@]}" create "$name" "${location[@]}" --node-id="$name" "${kind[@]}" --runtime-version="$runtime" \
    || return
  local describe=("${queued[@]}" describe "$name" "${location[@]}" --format='value(state.state)') state
  if [ -n "$dry_run" ]; then
    print_command "${describe[@]}"
    return
  fi
  while state=$("${describe[@]}"); do
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND*) log "the queued resource is $state: delete it, then try again" && return 1 ;;
    esac
    sleep "$poll"
  done
  return 1
}

# Install the code and its packages on all hosts.
setup() {
  local source=$repo bundle=${TMPDIR:-/tmp}/ilm_jax-$name.bundle commands
  if [ -z "$source" ]; then
    git diff --quiet HEAD || log 'uncommitted changes are not copied to the TPU'
    run git bundle create --quiet "$bundle" "$ref" || return
    run "${tpu[@]}" scp "$bundle" "$name:ilm_jax.bundle" "${location[@]}" --worker=all || return
    source=../ilm_jax.bundle
  fi
  commands="git init --quiet ilm_jax && cd ilm_jax && git fetch --quiet $(print_command "$source" "$ref")"
  commands+=' && git checkout --quiet --force --detach FETCH_HEAD'
  commands+=' && python3 -m pip install --quiet --user uv' # uv installs Python 3.12; the hosts come with Python 3.10
  commands+=' && python3 -m uv venv --quiet --allow-existing --python=3.12 .venv'
  commands+=" && python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu,gcs]'"
  run_on all "$commands"
}

# Shell code for the hosts. A host has the files ilm_jax.pid (process id of launch/resume.sh), ilm_jax.exit (exit code,
# once the run has ended) and ilm_jax.log in its home folder.
# shellcheck disable=SC2016 # $(...) is expanded on the host, not here
pid='$(cat ilm_jax.pid 2> /dev/null)'
is_running="[ ! -e ilm_jax.exit ] && kill -0 $pid 2> /dev/null"

# Start training on all hosts in the background. Fails if a run is already active.
start() {
  local command commands
  # JAX_PLATFORMS makes JAX fail without a TPU; otherwise it would silently train on the CPU.
  # --pause=60: the other hosts need up to a minute to notice a lost process; a restart must not come earlier.
  command=$(print_command launch/resume.sh --max_restarts="$max_restarts" --pause=60 --result=../ilm_jax.exit \
    -- env JAX_PLATFORMS=tpu,cpu .venv/bin/python -m ilm_jax.main "${flags[@]}")
  commands="if $is_running; then echo 'a run is already active on this TPU: stop it first' >&2; exit 1; fi"
  commands+="; rm -f ilm_jax.exit && cd ilm_jax && { setsid $command >> ../ilm_jax.log 2>&1 < /dev/null & }"
  commands+=' && echo $! > ../ilm_jax.pid'
  run_on all "$commands"
}

delete() {
  if [ -n "$queue" ]; then
    run "${queued[@]}" delete "$name" "${location[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${location[@]}" --quiet
  fi
}

# Print the state of the TPU and the run: gone (no TPU), busy (the TPU is being created, repaired or deleted), unknown
# (gcloud failed; its message is on standard error), idle (no run), running, or the exit code of the run.
describe=("${tpu[@]}" describe "$name" "${location[@]}" --format='value(state)')
run_state="if $is_running; then echo running; else cat ilm_jax.exit 2> /dev/null || echo idle; fi"
status() {
  local state
  state=$("${describe[@]}" 2>&1) || state="error: $state"
  case $state in
    READY) run_on 0 "$run_state" || echo unknown ;;
    PREEMPTED | TERMINATED | STOPPED | error:*NOT_FOUND*) echo gone ;;
    error:*) echo "$state" >&2 && echo unknown ;;
    *) echo busy ;;
  esac
}

# Create the TPU if it does not exist, install the code and start the run. Argument: the current status.
bring_up() {
  if [ "$1" = gone ]; then
    delete 2> /dev/null || true # a preempted TPU still exists as a resource
    create || return
  fi
  setup && start
}

# Keep the run going until it finishes or fails, then delete the TPU.
train() {
  if [ -n "$dry_run" ]; then
    create && setup && start && print_command "${describe[@]}" && run_on 0 "$run_state"
    [ -n "$keep" ] || delete
    return
  fi
  trap 'log "the run continues, and the TPU still costs money: follow it with train, save and end it with stop," \
    "delete the TPU with delete"
    exit 130' INT
  local starts=0 failures=0 now result=0
  while [ "$failures" -lt 3 ]; do
    now=$(status)
    [ "$starts$now" != 0unknown ] || fail 'gcloud failed (see the message above): nothing was created or deleted'
    [ "$starts$now" != 0running ] || starts=1
    case $now in
      running | busy | unknown) sleep "$poll" && continue ;;
      gone | idle | 75 | 143) ;; # gone: no TPU; idle: no run; 75: preempted, saved; 143: host rebooted
      *) [ "$starts" = 0 ] || break ;;
    esac
    [ "$starts" -le "$max_restarts" ] || break
    [ "$starts" = 0 ] || log "the run was preempted ($now): restarting it (restart $starts of $max_restarts)"
    if bring_up "$now"; then
      starts=$((starts + 1)) failures=0
    else
      failures=$((failures + 1))
    fi
    sleep "$poll"
  done
  if [ "$now" = 0 ]; then
    log 'the run has finished'
  else
    result=1
    run_on 0 'tail -n 30 ilm_jax.log' || true
    log "the run did not finish (last status: $now): fix the cause (see above), then run the same command again"
  fi
  if [ -n "$keep" ]; then log 'the TPU is kept, and costs money until launch/tpu_vm.sh delete'; else delete || true; fi
  return "$result"
}

case $action in
  run) start && log 'started; follow the run with logs, and delete the TPU afterwards: it costs money until then' ;;
  logs) run_on "$worker" 'tail -n 100 -F ilm_jax.log' ;;
  stop) run_on all "kill -TERM $pid" ;;
  *) "$action" ;;
esac
