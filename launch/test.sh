#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, the examples' short forms and the checkers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_environment.sh

usage() {
    cat <<'HELP'
usage: bash launch/test.sh [--full] [-- pytest arguments]

Runs ruff, mypy and pytest (two processes). Under 20 minutes on two cores.
  --full    the long forms too (tests marked slow; under 80 minutes)
  --        what follows goes to pytest, e.g. -- tests/unit -k linear

Tests that need a GPU or a C++ compiler are skipped without one, and counted in the summary.
JDDIST_TORCH and JDDIST_PYTHON: see launch/quickstart.sh --help.
HELP
}

selection='not slow'
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --full) selection=''; shift ;;
        --) shift; break ;;
        *) fail "found the argument '$1'; expected --full, --help or -- (see --help)" ;;
    esac
done

install_extras dev,examples,test
export OMP_NUM_THREADS=1

stage() {
    local name=$1
    shift
    say "$name"
    "$@" || fail "the stage '$name' failed"
}

stage "ruff check" "$python" -m ruff check .
stage "ruff format" "$python" -m ruff format --check .
stage "mypy" "$python" -m mypy
stage "pytest" "$python" -m pytest -n 2 -m "$selection" "$@"
