#!/usr/bin/env bash
# Trains every family on planning tasks (star graphs), one run after the other, and prints the table of results:
#
#   launch/table.sh star.py:tiny star.py:mini                     # small enough for a CPU
#   FAMILIES="ilm arm" SEEDS="3 4" launch/table.sh star.py:tiny   # more seeds; finished runs are not repeated
#   launch/table.sh star.py:medium star.py:hard                   # the paper's model size; needs a GPU or TPU
#
# Settings are environment variables:
#
#   variable    default                 meaning
#   RUNS        runs/table              folder of the runs
#   FAMILIES    ilm arm oracle mdm it   rows of the table for each task; oracle: arm trained on the reversed path
#   SEEDS       0 1 2                   seeds; each row averages over them
#   STEPS       6000                    training steps of every run; "" keeps the number of steps in the config
#   FLAGS       none                    more flags for every run
#   MDM_STEPS   32                      denoising steps of mdm (must exceed the tokens to fill in), at temperature 1
#   TABLE       standard output         file into which the table is written
#   PYTHON      python                  Python interpreter
#   DRY_RUN     none                    set to 1 to print the commands without running them
#
# A preempted run (exit code 75) is restarted. A run that was interrupted resumes when the script is run again.
# Last real run: 2026-11-21, star.py:tiny star.py:mini without oracle, on two CPU cores (RESULTS.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

script=table.sh dry_run=${DRY_RUN:-}
case ${1:-} in
  -h | --help) usage ;;
  '' | -*) fail "${1:-no config}: expected configs, such as: launch/table.sh star.py:tiny star.py:mini (see --help)" ;;
esac
RUNS=${RUNS:-runs/table}
FAMILIES=${FAMILIES:-ilm arm oracle mdm it}
SEEDS=${SEEDS:-0 1 2}
STEPS=${STEPS-6000}
FLAGS=${FLAGS:-}
MDM_STEPS=${MDM_STEPS:-32}
PYTHON=${PYTHON:-python}

# Run a command, and repeat it while it exits with 75 (preempted); in a dry run, print it.
repeat() {
  local code=75
  while [ "$code" = 75 ]; do
    code=0
    run "$@" || code=$?
  done
  return "$code"
}

workdirs=()
for config in "$@"; do
  for family in $FAMILIES; do
    for seed in $SEEDS; do
      workdir=$RUNS/${config/.py:/-}-${STEPS:-own}-$family-$seed
      workdirs+=("$workdir")
      grep -qs '"finished": true' "$workdir/eval.json" && continue
      flags=(--config.family="${family/oracle/arm}" --config.seed="$seed" --config.stop_at=0)
      [ "$family" = oracle ] && flags+=(--config.task.order=oracle)
      [ "$family" = mdm ] && flags+=(--config.sampling.token.temperature=1 --config.sampling.max_steps="$MDM_STEPS")
      [ -n "$STEPS" ] && flags+=(--config.steps="$STEPS")
      # shellcheck disable=SC2086 # FLAGS may hold several flags, separated by spaces
      repeat "$PYTHON" -m ilm_jax.main --config="configs/$config" --workdir="$workdir" "${flags[@]}" $FLAGS
    done
  done
done
if [ -n "${TABLE:-}" ] && [ -z "$dry_run" ]; then
  "$PYTHON" -m ilm_jax.cli report "${workdirs[@]}" > "$TABLE.part"
  mv "$TABLE.part" "$TABLE"
else
  run "$PYTHON" -m ilm_jax.cli report "${workdirs[@]}"
fi
