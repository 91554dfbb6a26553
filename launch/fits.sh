#!/usr/bin/env bash
# Compiles the training and decoding steps of several model sizes for TPU slices, to see which fit into memory. The
# output contains the numbers in the table of launch/README.md. No TPU is needed.
#
#   launch/fits.sh                      # all models and slices of the table; about an hour on one core
#   launch/fits.sh --topology=v5e:2x4   # only the models for one slice
#
#   --dry_run   print the commands without running them
#   PYTHON      environment variable: Python interpreter with `pip install -e '.[tpu]'`; default: python
#
# Last real run: 2026-11-21, the whole table, on one CPU core per row.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

script=fits.sh dry_run='' topology='' topology_known=''
for arg in "$@"; do
  case $arg in
    -h | --help) usage ;;
    --dry_run) dry_run=1 ;;
    --topology=*) topology=${arg#*=} ;;
    *) fail "$arg: unknown flag; expected --topology=SLICE or --dry_run (see --help)" ;;
  esac
done

# Compile one model for one slice. Arguments: SLICE CHIPS PRESET ROWS REMAT MESH_AXIS=SIZE ...
compile_for() {
  local slice=$1 chips=$2 preset=$3 rows=$4 remat=$5
  shift 5
  [ -z "$topology" ] || [ "$topology" = "$slice" ] || return 0
  topology_known=1
  # Each batch row of 1,024 positions holds four stories. Each host has four chips and packs its own group of rows.
  local command=("${PYTHON:-python}" -m ilm_jax.cli compile --config=configs/tinystories.py --topology="$slice"
    --config.model.preset="$preset" --config.model.compute=bfloat16 --config.model.scan_layers=True
    --config.model.remat="$remat" --config.data.rows="$rows" --config.data.batch_size=$((4 * rows))
    --config.data.groups=$((chips / 4)) --config.eval.batch_size=256 --config.task.tokenizer.size=10240
    "${@/#/--config.mesh.}")
  print_command "${command[@]}"
  [ -n "$dry_run" ] || "${command[@]}"
}

compile_for v5e:2x4 8 small 64 False data=1 fsdp=8
compile_for v5e:2x4 8 1b 32 True data=1 fsdp=8
compile_for v5e:2x4 8 8b 16 True data=1 fsdp=8
compile_for v5e:16x16 256 small 2048 False data=256
compile_for v5e:16x16 256 1b 1024 True data=8 fsdp=32
compile_for v5e:16x16 256 8b 512 True data=1 fsdp=256
compile_for v5p:4x4x4 64 small 1024 False data=64
compile_for v5p:4x4x4 64 1b 512 True data=8 fsdp=8
compile_for v5p:4x4x4 64 8b 256 True data=1 fsdp=64
compile_for v5p:4x4x4 64 8b 256 True data=1 fsdp=16 tensor=4
compile_for v6e:16x16 256 small 4096 False data=256
compile_for v6e:16x16 256 1b 2048 True data=32 fsdp=8
compile_for v6e:16x16 256 8b 1024 True data=1 fsdp=256
[ -n "$topology_known" ] || fail "--topology=$topology: expected v5e:2x4, v5e:16x16, v5p:4x4x4 or v6e:16x16"
