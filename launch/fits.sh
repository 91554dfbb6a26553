#!/usr/bin/env bash
# Asks the real TPU compiler what fits where: the rows of the table in launch/README.md, one after the other.
#
#   launch/fits.sh                    # all of them, about an hour on one core
#   launch/fits.sh --topology=v5e:2x4 # those of a slice
#
#   --dry_run   print the commands
#   PYTHON      the interpreter, of an environment with pip install -e '.[tpu]'; python
#
# Needs no TPU, and little memory.
# Last really run: 2026-11-21, all rows, each on one core of two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

me=fits.sh dry_run='' topology='' found=''
for arg in "$@"; do
  case $arg in
    -h | --help) usage ;;
    --dry_run) dry_run=1 ;;
    --topology=*) topology=${arg#*=} ;;
    *) fail "$arg: unknown; expected --topology=, --dry_run (see --help)" ;;
  esac
done

fits() { # SLICE CHIPS PRESET ROWS REMAT MESH...
  local slice=$1 chips=$2 preset=$3 rows=$4 remat=$5
  shift 5
  [ -z "$topology" ] || [ "$topology" = "$slice" ] || return 0
  found=1
  # Rows of 1,024 positions, four stories each; a host has four chips, and packs a group.
  local command=("${PYTHON:-python}" -m ilm_jax.cli compile --config=configs/tinystories.py --topology="$slice"
    --config.model.preset="$preset" --config.model.compute=bfloat16 --config.model.scan_layers=True
    --config.model.remat="$remat" --config.data.rows="$rows" --config.data.batch_size=$((4 * rows))
    --config.data.groups=$((chips / 4)) --config.eval.batch_size=256 --config.task.tokenizer.size=10240
    "${@/#/--config.mesh.}")
  quoted "${command[@]}"
  [ -n "$dry_run" ] || "${command[@]}"
}

fits v5e:2x4 8 small 64 False data=1 fsdp=8
fits v5e:2x4 8 1b 32 True data=1 fsdp=8
fits v5e:2x4 8 8b 16 True data=1 fsdp=8
fits v5e:16x16 256 small 2048 False data=256
fits v5e:16x16 256 1b 1024 True data=8 fsdp=32
fits v5e:16x16 256 8b 512 True data=1 fsdp=256
fits v5p:4x4x4 64 small 1024 False data=64
fits v5p:4x4x4 64 1b 512 True data=8 fsdp=8
fits v5p:4x4x4 64 8b 256 True data=1 fsdp=64
fits v5p:4x4x4 64 8b 256 True data=1 fsdp=16 tensor=4
fits v6e:16x16 256 small 4096 False data=256
fits v6e:16x16 256 1b 2048 True data=32 fsdp=8
fits v6e:16x16 256 8b 1024 True data=1 fsdp=256
[ -n "$found" ] || fail "--topology=$topology: expected v5e:2x4, v5e:16x16, v5p:4x4x4 or v6e:16x16"
