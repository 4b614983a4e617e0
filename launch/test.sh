#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, the examples' short forms and the checkers,
# and builds the documentation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_environment.sh

usage() {
    cat <<'HELP'
usage: bash launch/test.sh [--full] [-- pytest arguments]

Runs ruff, mypy, the documentation's build (build/docs), pytest (two processes) and the examples, and
ends with a summary. Every stage runs, also after one that failed. Under 20 minutes on two cores.
  --full    the long forms (the tests marked slow, the examples in full; under 80 minutes)
  --        what follows goes to pytest, e.g. -- tests/unit -k linear

Tests that need a GPU or a C++ compiler are skipped without one, and counted in the summary.
JDDIST_TORCH and JDDIST_PYTHON: see launch/quickstart.sh --help.
HELP
}

selection='not slow'
form=--smoke
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --full) selection='' form=''; shift ;;
        --) shift; break ;;
        *) fail "found the argument '$1'; expected --full, --help or -- (see --help)" ;;
    esac
done

install_extras dev,examples,test
export OMP_NUM_THREADS=1

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
summary=''
failed=''

stage() {
    local name=$1 started=$SECONDS result=passed
    shift
    say "$name"
    "$@" || { result=FAILED; failed+="${failed:+, }$name"; }
    summary+="$result  $name, $((SECONDS - started)) s"$'\n'
}

run_pytest() { "$python" -m pytest -n 2 -m "$selection" "$@" 2>&1 | tee "$scratch/pytest.log"; }

run_examples() {
    local example
    for example in examples/[!_]*.py; do
        say "$example $form"
        # shellcheck disable=SC2086
        "$python" "$example" $form --out "$scratch/examples" || return 1
    done
}

stage "ruff check" "$python" -m ruff check .
stage "ruff format" "$python" -m ruff format --check .
stage "mypy" "$python" -m mypy
stage "docs" "$python" -m sphinx -q -W -E docs build/docs
stage "pytest" run_pytest "$@"
stage "examples" run_examples

last=$(grep -E '(passed|failed|skipped|error|no tests).* in [0-9.]+s' "$scratch/pytest.log" | tail -n 1 || true)
skipped=$(grep -oE '[0-9]+ skipped' <<< "$last" || echo '0 skipped')
say "summary"
printf '%s%s\n' "$summary" "tests: ${skipped% skipped} skipped (the reasons are above); pytest's last line:"
printf '%s\n' "${last:-pytest did not finish}"
[ -z "$failed" ] || fail "failed: $failed"
