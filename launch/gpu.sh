#!/usr/bin/env bash
# Trains on one host with all its GPUs, and goes on after a preemption or a crash:
#
#   launch/gpu.sh --config=configs/star.py:hard --workdir=runs/hard [--config.a.b=c ...]
#
#   --max_restarts=100  then it gives up
#   --dry_run           print the commands
#   PYTHON              the interpreter; without one, .venv's, set up with `make setup EXTRAS=cuda`
#
# Flags are written --name=value. Several hosts without Slurm: the same command on each, with
# --coordinator=HOST:PORT --num_processes=N --process_id=I (HOST is that of process 0; launch/README.md).
# Last really run: never: dry run only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

me=gpu.sh dry_run='' max_restarts=100 pause=10 config='' flags=()
for arg in "$@"; do
  case $arg in
    -h | --help) usage ;;
    --dry_run) dry_run=1 ;;
    --max_restarts=*) max_restarts=${arg#*=} ;;
    --config=*) config=$arg flags+=("$arg") ;;
    --coordinator=*) pause=60 flags+=("$arg") ;; # the others notice within a minute that this host is gone
    --config.*=* | --workdir=* | --mode=* | --num_processes=* | --process_id=*) flags+=("$arg") ;;
    *) fail "$arg: unknown; expected --config=, --workdir=, --config.a.b=, --max_restarts=, --dry_run (see --help)" ;;
  esac
done
[ -n "$config" ] || fail '--config is missing: expected a file, such as --config=configs/star.py:hard'
whole --max_restarts "$max_restarts"

if [ -z "${PYTHON:-}" ]; then
  run make setup EXTRAS=cuda
  PYTHON=.venv/bin/python
fi
# With the platforms named, JAX refuses to start without a GPU; else it would train on the CPU.
command=(env JAX_PLATFORMS='cuda,cpu' launch/resume.sh --max_restarts="$max_restarts" --pause="$pause"
  -- "$PYTHON" -m ilm_jax.main "${flags[@]}")
[ -z "$dry_run" ] || {
  quoted "${command[@]}"
  exit 0
}
exec "${command[@]}"
