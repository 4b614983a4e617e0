#!/usr/bin/env bash
# Installs jddist into .venv and runs the main job, examples/digits.py, on all GPUs or 2 CPU ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_environment.sh

usage() {
    cat <<'HELP'
usage: bash launch/quickstart.sh [--help] [options of examples/digits.py]

Creates .venv, installs jddist with the tested versions (constraints.txt), and trains on
scikit-learn's digits by the mean, the global UPGrad and the per-rank UPGrad, with
  torchrun --standalone --nproc-per-node N examples/digits.py
where N is the number of GPUs, or 2 without one. Results go to runs/digits/. A second run skips the
installation.

environment variables:
  JDDIST_TORCH    the requirement by which pip installs torch, with options; for a CUDA build e.g.
                  JDDIST_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
                  (default: torch as pinned in constraints.txt, from your own pip configuration)
  JDDIST_PYTHON   the Python (>= 3.11) with which to create .venv (default: python3, ...)
  JDDIST_NPROC    the number of ranks (default: the number of GPUs, else 2)
HELP
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac

install_extras examples
ranks=${JDDIST_NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
[ $# -gt 0 ] || set -- --seeds 3
say "training: $ranks ranks"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    examples/digits.py "$@"
