# shellcheck shell=bash
# Sourced by the other scripts: creates .venv and installs what is asked for, once.
#
# install_extras EXTRA,EXTRA...  leaves $python set to the environment's interpreter. The work is
# skipped if pyproject.toml, constraints.txt, JDDIST_TORCH, the interpreter and the extras are those
# of an earlier successful run.

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "${JDDIST_PYTHON:-}" ] || candidates=("$JDDIST_PYTHON")
    for candidate in "${candidates[@]}"; do
        if recent "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "found no Python >= 3.11 among: ${candidates[*]}; put one on the PATH, or name it in JDDIST_PYTHON"
}

install_extras() {
    local extras=$1 base venv=.venv stamp key
    local torch=${JDDIST_TORCH:-}
    base=$(find_python) || exit 1
    python=$PWD/$venv/bin/python
    stamp=$venv/.jddist-${extras//,/-}
    key=$(
        {
            cat pyproject.toml constraints.txt
            printf '%s\n' "$extras" "$torch" "$PWD"
            "$base" -c 'import sys; print(sys.version)'
        } | "$base" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
    )
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        say "environment: .venv is up to date ($extras)"
        return
    fi
    say "environment: installing into .venv ($extras); this may take some minutes"
    # Without pip it is what an interrupted run left behind: making it again repairs it.
    if ! "$python" -c 'import pip' 2>/dev/null; then
        "$base" -m venv "$venv" || fail "'$base -m venv' failed; install the venv module of your Python"
    fi
    recent "$python" || fail "found an older Python in .venv; expected >= 3.11. Remove .venv and try again"
    install_torch "$torch"
    "$python" -m pip install --quiet -c "$venv/constraints.txt" -e ".[$extras]" \
        || fail "could not install jddist[$extras]"
    printf '%s\n' "$key" > "$stamp"
}

# torch comes first: whatever depends on it then finds it there, and brings no other build.
install_torch() {
    local torch=$1 built=.venv/.torch
    # To pip, 2.13.0+cpu already is the 2.13.0 of another index: only removing it changes the build.
    if [ -e "$built" ] && [ "$(cat "$built")" != "$torch" ]; then
        "$python" -m pip uninstall --quiet --yes torch || fail "could not remove the other build of torch"
        rm -f .venv/.jddist-*
    fi
    printf '%s\n' "$torch" > "$built"
    if [ -n "$torch" ]; then
        # Unquoted on purpose: it may hold options, such as --index-url.
        # shellcheck disable=SC2086
        "$python" -m pip install --quiet $torch || fail "could not install JDDIST_TORCH='$torch'"
        # Pinned as it came, so that nothing later replaces it by another build.
        grep -v '^torch==' constraints.txt > .venv/constraints.txt
        "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
            >> .venv/constraints.txt || fail "found no torch after installing JDDIST_TORCH='$torch'"
    else
        "$python" -m pip install --quiet -c constraints.txt torch || fail "could not install torch"
        cp constraints.txt .venv/constraints.txt
    fi
}
