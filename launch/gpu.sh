#!/usr/bin/env bash
# Trains on all GPUs of one machine, and resumes after a preemption or a crash:
#
#   launch/gpu.sh --config=configs/star.py:hard --workdir=runs/hard [--config.a.b=c ...]
#
#   --max_restarts=100  number of restarts before giving up
#   --dry_run           print the commands without running them
#   PYTHON              environment variable: Python interpreter. By default .venv/bin/python, which
#                       `make setup EXTRAS=cuda` installs first
#
# Flags must be written --name=value. On several machines without Slurm, run the same command on each and add
# --coordinator=HOST:PORT --num_processes=N --process_id=I, where HOST is the machine of process 0; see
# launch/README.md.
# Last real run: never, only dry runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

script=gpu.sh dry_run='' max_restarts=100 pause=10 config='' flags=()
for arg in "$@"; do
  case $arg in
    -h | --help) usage ;;
    --dry_run) dry_run=1 ;;
    --max_restarts=*) max_restarts=${arg#*=} ;;
    --config=*) config=$arg flags+=("$arg") ;;
    # Other machines need up to a minute to notice that a process was lost, so wait a minute before a restart.
    --coordinator=*) pause=60 flags+=("$arg") ;;
    --config.*=* | --workdir=* | --mode=* | --num_processes=* | --process_id=*) flags+=("$arg") ;;
    *) fail "$arg: unknown flag; expected --config=, --workdir=, --config.a.b=, --max_restarts=, --dry_run" ;;
  esac
done
[ -n "$config" ] || fail '--config is missing: expected a config file, such as --config=configs/star.py:hard'
require_whole_numbers --max_restarts "$max_restarts"

if [ -z "${PYTHON:-}" ]; then
  run make setup EXTRAS=cuda
  PYTHON=.venv/bin/python
fi
# JAX_PLATFORMS makes JAX fail without a GPU; otherwise it would silently train on the CPU.
command=(env JAX_PLATFORMS='cuda,cpu' launch/resume.sh --max_restarts="$max_restarts" --pause="$pause"
  -- "$PYTHON" -m ilm_jax.main "${flags[@]}")
[ -z "$dry_run" ] || {
  print_command "${command[@]}"
  exit 0
}
exec "${command[@]}"
