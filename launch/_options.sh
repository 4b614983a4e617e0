# shellcheck shell=bash
# Sourced by the launchers: how options are read. Needs _environment.sh (fail), and a function usage.

# read_options 'SWITCH=VARIABLE ...' 'OPTION=VARIABLE ...' -- WORDS
# Reads the options at the head of WORDS. A switch sets its variable to yes, any other option sets it
# to the word after it, or after its "=". The array script is left with what follows: the script and
# its arguments, or -m, a module and those of it. --help prints usage and ends.
read_options() {
    local switches=" $1 " options=" $2 " name
    shift 3
    while [ $# -gt 0 ]; do
        name=${1%%=*}
        case $1 in
            -h | --help) usage; exit 0 ;;
            -m) break ;;
            -*) ;;
            *) break ;;
        esac
        if [[ $switches =~ " $1="([a-z_]+)" " ]]; then
            printf -v "${BASH_REMATCH[1]}" yes
            shift
        elif [[ $options =~ " $name="([a-z_]+)" " ]]; then
            if [ "$name" != "$1" ]; then
                printf -v "${BASH_REMATCH[1]}" %s "${1#*=}"
                shift
            else
                [ $# -gt 1 ] || fail "found $1 without a value (see --help)"
                printf -v "${BASH_REMATCH[1]}" %s "$2"
                shift 2
            fi
        else
            fail "found the option '$1'; expected one of --help's before the script"
        fi
    done
    # shellcheck disable=SC2034
    script=("$@")
}
