# Sourced by the other scripts: creates .venv and installs what is asked for, once.
#
# install_extras EXTRA,EXTRA...  leaves $python set to the environment's interpreter. The work is
# skipped if pyproject.toml, constraints.txt, JDDIST_TORCH, the interpreter and the extras are those
# of an earlier successful run.

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${JDDIST_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "found no Python >= 3.11; expected python3, or its path in JDDIST_PYTHON"
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
    say "environment: installing into .venv ($extras)"
    if [ ! -x "$python" ]; then
        "$base" -m venv "$venv" || fail "'$base -m venv' failed; install the venv module of your Python"
    fi
    rm -f "$stamp"
    # torch first: whatever depends on it then finds it there, and brings no other build.
    if [ -n "$torch" ]; then
        # Unquoted on purpose: it may hold options, such as --index-url.
        # shellcheck disable=SC2086
        "$python" -m pip install --quiet $torch || fail "could not install JDDIST_TORCH='$torch'"
        grep -v '^torch==' constraints.txt > "$venv/constraints.txt"
    else
        "$python" -m pip install --quiet -c constraints.txt torch || fail "could not install torch"
        cp constraints.txt "$venv/constraints.txt"
    fi
    "$python" -m pip install --quiet -c "$venv/constraints.txt" -e ".[$extras]" \
        || fail "could not install jddist[$extras]"
    printf '%s\n' "$key" > "$stamp"
}
