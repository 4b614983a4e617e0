#!/usr/bin/env bash
# Starts a training script on all GPUs, or on CPU ranks, of this machine.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$home/launch/_environment.sh"
. "$home/launch/_ranks.sh"

usage() {
    cat <<'HELP'
usage: bash launch/torchrun.sh [options] [SCRIPT [arguments]]
       bash launch/torchrun.sh [options] -m MODULE [arguments]

Starts SCRIPT (default: examples/digits.py) on this machine, one rank for each GPU, or 2 without one.

  --nproc N    the number of ranks
  --dry-run    print the command instead of running it
  --help

environment variables:
  JDDIST_NPROC         as --nproc
  JDDIST_RUN_PYTHON    the Python of the ranks (default: that of .venv, else python3)
  OMP_NUM_THREADS, NCCL_DEBUG
                       set to cores / ranks and WARN, unless they are set
  PET_...              torchrun's own options, e.g. PET_LOG_DIR=logs for --log-dir logs
HELP
}

dry_run='' ranks=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --nproc) [ $# -gt 1 ] || fail "found --nproc without a number"; ranks=$2; shift 2 ;;
        -m) break ;;
        -*) fail "found the option '$1'; expected --nproc, --dry-run or --help before the script (see --help)" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || set -- "$home/examples/digits.py"

choose_python
ranks=$(ranks_per_node "$ranks" 2)
set_environment "$ranks"
run_or_print "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"
