#!/usr/bin/env bash
# Trains with DeepSpeed's own launcher: examples/digits_deepspeed.py, or a script of yours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_environment.sh

usage() {
    cat <<'HELP'
usage: bash launch/deepspeed.sh [--dry-run] [--stage 1|2|3] [--hostfile FILE] [options of the script]

Installs jddist[deepspeed,examples] into .venv, and runs
  deepspeed --num_accelerators N examples/digits_deepspeed.py --config launch/deepspeed/zeroS.json
on this machine, with N the number of GPUs, or 2 without one. No ssh is needed for that. Results go
to runs/digits_deepspeed/.
  --stage S       ZeRO stage 1, 2 (the default) or 3: launch/deepspeed/zero1.json, ...
  --hostfile FILE the machines ("worker-0 slots=8", one a line), which need ssh and the same paths;
                  N is then the slots of each
  --dry-run       print the command instead of installing and running anything
What follows goes to the script, e.g. --smoke, --epochs 5, --out runs/mine.

environment variables:
  JDDIST_NPROC    the number of ranks on this machine
  JDDIST_SCRIPT   another script, which is given --config FILE and the options
  MASTER_PORT     the port at which the ranks meet (default: one that is free)
  JDDIST_TORCH, JDDIST_PYTHON: see launch/quickstart.sh --help
HELP
}

stage=2
hostfile=''
dry=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry=1; shift ;;
        --stage) stage=${2:-}; shift; shift || true ;;
        --hostfile) hostfile=${2:-}; shift; shift || true ;;
        *) break ;;
    esac
done
config=launch/deepspeed/zero$stage.json
[ -f "$config" ] || fail "found --stage '$stage'; expected 1, 2 or 3"
[ -z "$hostfile" ] || [ -f "$hostfile" ] || fail "found no hostfile '$hostfile'; expected a file with lines such as 'worker-0 slots=8'"
script=${JDDIST_SCRIPT:-examples/digits_deepspeed.py}
[ -f "$script" ] || fail "found no script '$script' (JDDIST_SCRIPT); expected a file"

if [ -n "$dry" ]; then
    python=${JDDIST_PYTHON:-.venv/bin/python}
    ranks=${JDDIST_NPROC:-2}
    port=${MASTER_PORT:-29500}
else
    install_extras deepspeed,examples
    ranks=${JDDIST_NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
    port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
fi
if [ -n "$hostfile" ]; then
    where=(--hostfile "$hostfile")
else
    # A file that is not there keeps the launcher from looking for /job/hostfile.
    where=(--hostfile /nonexistent --num_accelerators "$ranks")
fi
command=("$python" -m deepspeed.launcher.runner "${where[@]}" --master_port "$port"
    --no_local_rank "$script" --config "$config" "$@")
if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
# The launcher starts the interpreter that is first on the PATH of each machine.
export PATH="${python%/*}:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
say "training: ZeRO stage $stage, ${hostfile:-$ranks ranks}"
exec "${command[@]}"
