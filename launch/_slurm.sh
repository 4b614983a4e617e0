# shellcheck shell=bash
# Sourced by slurm.sbatch. Needs fail.

# Prints SLURM's list of nodes, such as "gpu[01-03,7],login", as gpu01,gpu02,gpu03,gpu7,login.
expand_node_list() {
    local list=$1 part='' parts=() depth=0 i letter
    if command -v scontrol > /dev/null; then
        scontrol show hostnames "$list" | paste -sd, -
        return
    fi
    # Commas inside of brackets do not separate nodes.
    for ((i = 0; i < ${#list}; i++)); do
        letter=${list:i:1}
        case $letter in
            '[') depth=$((depth + 1)) ;;
            ']') depth=$((depth - 1)) ;;
        esac
        if [ "$letter" = , ] && [ "$depth" -eq 0 ]; then
            parts+=("$part")
            part=''
        else
            part+=$letter
        fi
    done
    [ "$depth" -eq 0 ] || fail "found the list of nodes '$list'; expected a ] for every ["
    parts+=("$part")
    for part in "${parts[@]}"; do
        _expand_brackets "$part"
    done | paste -sd, -
}

# Prints one node in a line; only the first brackets are expanded here, the rest by recursion.
_expand_brackets() {
    local name=$1 range number first last ranges
    if [[ ! $name =~ ^([^][]*)\[([^][]*)\](.*)$ ]]; then
        printf '%s\n' "$name"
        return
    fi
    local before=${BASH_REMATCH[1]} after=${BASH_REMATCH[3]}
    IFS=, read -ra ranges <<< "${BASH_REMATCH[2]}"
    for range in "${ranges[@]}"; do
        first=${range%-*} last=${range#*-}
        for ((number = 10#$first; number <= 10#$last; number++)); do
            _expand_brackets "$before$(printf '%0*d' "${#first}" "$number")$after"
        done
    done
}
