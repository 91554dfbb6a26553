#!/usr/bin/env bash
# Makes the runs behind the table of the planning tasks, one after the other, and the table from them:
#
#   launch/table.sh star.py:tiny star.py:mini              # the CPU table
#   FAMILIES="ilm arm" SEEDS="3 4" launch/table.sh star.py:tiny   # more seeds later; finished runs are kept
#   launch/table.sh star.py:medium star.py:hard            # the paper's size: a GPU or TPU, 50,000 steps each
#
#   RUNS      folder of the runs                           runs/table
#   FAMILIES  rows of each task                            "ilm arm oracle mdm it"; oracle: arm on the reversed path
#   SEEDS     of each row                                  "0 1 2"
#   STEPS     of every run: one budget for all families    6000; "" is the config's own
#   FLAGS     more flags for every run                     ""
#   MDM_STEPS denoising steps of mdm: more than the places that it fills, drawn at temperature 1      32
#   TABLE     file for the table                           standard output
#   PYTHON    the interpreter                              python
#   DRY_RUN   1: print the commands only
#
# A run that was preempted (exit code 75) is started again; one that was interrupted goes on at the next call.
# Last really run: 2026-11-21, star.py:tiny star.py:mini without oracle, on two CPU cores (RESULTS.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUNS=${RUNS:-runs/table}
FAMILIES=${FAMILIES:-ilm arm oracle mdm it}
SEEDS=${SEEDS:-0 1 2}
STEPS=${STEPS-6000}
FLAGS=${FLAGS:-}
MDM_STEPS=${MDM_STEPS:-32}
PYTHON=${PYTHON:-python}
DRY_RUN=${DRY_RUN:-}
[ $# -gt 0 ] || { echo "expected configs, such as: launch/table.sh star.py:tiny star.py:mini" >&2; exit 1; }

run() {
  if [ -n "$DRY_RUN" ]; then
    echo "$*"
    return 0
  fi
  local code=75
  while [ "$code" = 75 ]; do
    code=0
    "$@" || code=$?
  done
  return "$code"
}

folders=()
for config in "$@"; do
  for family in $FAMILIES; do
    for seed in $SEEDS; do
      workdir=$RUNS/${config/.py:/-}-${STEPS:-own}-$family-$seed
      folders+=("$workdir")
      grep -qs '"finished": true' "$workdir/eval.json" && continue
      flags=(--config.family="${family/oracle/arm}" --config.seed="$seed" --config.stop_at=0)
      [ "$family" = oracle ] && flags+=(--config.task.order=oracle)
      [ "$family" = mdm ] && flags+=(--config.sampling.token.temperature=1 --config.sampling.max_steps="$MDM_STEPS")
      [ -n "$STEPS" ] && flags+=(--config.steps="$STEPS")
      # shellcheck disable=SC2086 # FLAGS holds several
      run "$PYTHON" -m ilm_jax.main --config="configs/$config" --workdir="$workdir" "${flags[@]}" $FLAGS
    done
  done
done
if [ -n "${TABLE:-}" ] && [ -z "$DRY_RUN" ]; then
  "$PYTHON" -m ilm_jax.cli report "${folders[@]}" > "$TABLE.part"
  mv "$TABLE.part" "$TABLE"
else
  run "$PYTHON" -m ilm_jax.cli report "${folders[@]}"
fi
