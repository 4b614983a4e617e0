#!/usr/bin/env bash
# Starts a training script on all GPUs, or on CPU ranks, of this machine.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$home/launch/_environment.sh"
. "$home/launch/_options.sh"
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
read_options '--dry-run=dry_run' '--nproc=ranks' -- "$@"
set -- "${script[@]}"
[ $# -gt 0 ] || set -- "$home/examples/digits.py"
check_script "$@"

choose_python
ranks=$(ranks_per_node "$ranks" 2)
set_environment "$ranks"
run_or_print "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"
