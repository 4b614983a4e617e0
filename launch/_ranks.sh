# shellcheck shell=bash
# Sourced by the launchers: what they share. Needs _environment.sh (say, fail).

# Leaves $python set to the interpreter that runs the ranks: JDDIST_RUN_PYTHON, else that of .venv in
# the clone ($home), else the first python3 on the PATH.
# shellcheck disable=SC2154
choose_python() {
    python=${JDDIST_RUN_PYTHON:-}
    if [ -z "$python" ]; then
        python=$home/.venv/bin/python
        [ -x "$python" ] || python=$(command -v python3) || fail "found no python3 on the PATH and no .venv; run launch/quickstart.sh first, or name a Python in JDDIST_RUN_PYTHON"
    fi
}

# number NAME VALUE MINIMUM: fails unless VALUE is a whole number and large enough.
number() {
    [[ $2 =~ ^[0-9]+$ ]] && [ "$2" -ge "$3" ] || fail "found $1 '$2'; expected a whole number, $3 or more"
}

# Prints the ranks for each machine: what is asked for, else its GPUs, else the default.
ranks_per_node() {
    local asked=${1:-${JDDIST_NPROC:-}} default=$2
    if [ -z "$asked" ]; then
        asked=$("$python" -c 'import sys, torch; print(torch.cuda.device_count() or sys.argv[1])' "$default") \
            || fail "found no torch in $python; run launch/quickstart.sh first, or name a Python in JDDIST_RUN_PYTHON"
    fi
    number "the number of ranks" "$asked" 1
    printf '%s' "$asked"
}

# set_default NAME VALUE: exports NAME unless the user has set it, and remembers it for --dry-run.
environment=()
set_default() {
    [ -n "${!1+set}" ] || export "$1=$2"
    environment+=("$1=${!1}")
}

# Each of these is left alone if it is set already.
set_environment() {
    local ranks=$1 interface=${2:-} cores
    cores=$(getconf _NPROCESSORS_ONLN)
    # torchrun would set 1, and warn: the ranks share the cores evenly instead.
    set_default OMP_NUM_THREADS "$((cores / ranks > 0 ? cores / ranks : 1))"
    # NCCL says nothing of its errors otherwise.
    set_default NCCL_DEBUG WARN
    # gloo takes the address of the host's name, which is often 127.0.1.1 or another network's. NCCL
    # looks for an interface by itself. TORCH_NCCL_ASYNC_ERROR_HANDLING is on by default.
    [ -z "$interface" ] || set_default GLOO_SOCKET_IFNAME "$interface"
}

# check_script WORDS: fails unless they begin with -m or with a file, where it is about to be run.
check_script() {
    [ -z "$dry_run" ] && [ "$1" != -m ] && [ -z "${PET_NO_PYTHON:-}${PET_MODULE:-}" ] || return 0
    [ -f "$1" ] || fail "found no script '$1'; expected a file, or -m and the name of a module"
}

# Prints the command, ready to be pasted, or becomes it.
run_or_print() {
    if [ -n "$dry_run" ]; then
        printf '%s ' "${environment[@]}"
        printf '%q ' "$@"
        printf '\n'
    else
        exec "$@"
    fi
}
