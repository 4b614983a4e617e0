#!/usr/bin/env bash
# Starts a training script on several machines: by ssh from one of them, or by hand on each.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$home/launch/_environment.sh"
. "$home/launch/_options.sh"
. "$home/launch/_ranks.sh"

usage() {
    cat <<'HELP'
usage: bash launch/multinode.sh --hosts HOST,HOST,... [options] [SCRIPT [arguments]]
       bash launch/multinode.sh [options] -m MODULE [arguments]

Starts SCRIPT (default: examples/digits.py) on several machines that have this clone, and its .venv,
at the same path. Run the same command on every one of them, or with --ssh on any one. The first host
is where they meet (torchrun's c10d rendezvous).

  --hosts A,B,...      names or addresses of the machines, the same list everywhere
  --hostfile FILE      the same, one in a line; what follows the name, and #, is ignored
  --node-rank R        the place of this machine in the list (default: SLURM_NODEID, or found by its
                       addresses)
  --nproc N            ranks on each machine (default: one for each GPU, or 1 without one)
  --port P             where the first host listens (default: 29400)
  --id NAME            tells jobs at one port apart (default: jddist)
  --timeout SECONDS    how long to wait for the other machines (default: 600)
  --ssh                start all machines from here; JDDIST_SSH names another command than ssh
  --dry-run            print the command, or with --ssh all commands, instead of running
  --help

environment variables, where no --hosts and no --hostfile is given:
  JDDIST_HOSTS         as --hosts
  MASTER_ADDR, NNODES, NODE_RANK, MASTER_PORT
                       the first host, the number of machines, the place of this one, and the port,
                       as many schedulers set them
others:
  JDDIST_NPROC         as --nproc
  JDDIST_RUN_PYTHON    the Python of the ranks (default: that of .venv, else python3)
  OMP_NUM_THREADS, NCCL_DEBUG, GLOO_SOCKET_IFNAME
                       set to cores / ranks, WARN and the interface towards the first host, unless
                       they are set
  PET_...              torchrun's own options, e.g. PET_LOG_DIR=logs for --log-dir logs
HELP
}

dry_run='' ranks='' hosts='' hostfile='' node='' port=${MASTER_PORT:-29400} id=jddist timeout=600 ssh=''
read_options '--dry-run=dry_run --ssh=ssh' \
    '--hosts=hosts --hostfile=hostfile --node-rank=node --nproc=ranks --port=port --id=id --timeout=timeout' \
    -- "$@"
set -- "${script[@]}"
[ $# -gt 0 ] || set -- "$home/examples/digits.py"

if [ -n "$hostfile" ]; then
    [ -z "$hosts" ] || fail "found both --hosts and --hostfile; expected one of them"
    [ -r "$hostfile" ] || fail "found no file '$hostfile'; expected the list of hosts"
    hosts=$(sed -e 's/#.*//' "$hostfile" | awk 'NF { printf "%s%s", comma, $1; comma = "," }')
    [ -n "$hosts" ] || fail "found no host in '$hostfile'; expected one in each line"
fi
hosts=${hosts:-${JDDIST_HOSTS:-}}
if [ -n "$hosts" ]; then
    # srun says which node this is.
    node=${node:-${SLURM_NODEID:-}}
    [[ $hosts =~ ^[^,[:space:]]+(,[^,[:space:]]+)*$ ]] || fail "found the hosts '$hosts'; expected names with commas between them, and nothing else"
    nodes=$(tr -cd , <<< "$hosts" | wc -c)
    nodes=$((nodes + 1))
    first=${hosts%%,*}
else
    missing=''
    for name in MASTER_ADDR NNODES NODE_RANK; do
        [ -n "${!name:-}" ] || missing+="${missing:+, }$name"
    done
    [ -z "$missing" ] || fail "found no --hosts, no --hostfile and no JDDIST_HOSTS, and of the other variables these are missing: $missing; expected one of these ways to name the machines (see --help)"
    [ -z "$ssh" ] || fail "found --ssh without a list of hosts; expected --hosts or --hostfile"
    first=$MASTER_ADDR nodes=$NNODES node=${node:-$NODE_RANK}
fi
number "the number of machines" "$nodes" 1
number --port "$port" 1
number --timeout "$timeout" 1
[ -z "$node" ] || number "the node rank" "$node" 0
choose_python

# Starts this script on every host, and ends all of them with the first that fails.
start_by_ssh() {
    local host rank=0 line words=() started=() status=0
    [ -z "$ranks" ] || words+=(--nproc "$ranks")
    for name in OMP_NUM_THREADS NCCL_DEBUG GLOO_SOCKET_IFNAME JDDIST_NPROC JDDIST_RUN_PYTHON; do
        [ -z "${!name+set}" ] || environment+=("$name=${!name}")
    done
    [ -n "$dry_run" ] || trap 'kill "${started[@]}" 2> /dev/null || true; wait || true' EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    for host in ${hosts//,/ }; do
        line=$(printf '%q ' cd "$PWD")"&& exec env "
        [ ${#environment[@]} -eq 0 ] || line+=$(printf '%q ' "${environment[@]}")
        line+=$(printf '%q ' bash "$home/launch/multinode.sh" --hosts "$hosts" --node-rank "$rank" \
            --port "$port" --id "$id" --timeout "$timeout" "${words[@]}" "$@")
        if [ -n "$dry_run" ]; then
            printf '%s %s %q\n' "${JDDIST_SSH:-ssh -tt}" "$host" "$line"
        else
            # With a terminal (-tt), what runs there ends when the connection does.
            # shellcheck disable=SC2086
            ${JDDIST_SSH:-ssh -tt} "$host" "$line" < /dev/null &
            started+=($!)
        fi
        rank=$((rank + 1))
    done
    for host in "${started[@]}"; do
        wait -n || { status=$?; break; }
    done
    [ "$status" -eq 0 ] || fail "a machine ended with exit code $status; the others were stopped"
}

if [ -n "$ssh" ]; then
    start_by_ssh "$@"
    exit 0
fi

check_script "$@"
if [ -n "$hosts" ]; then
    found=$("$python" "$home/launch/_network.py" "$hosts" ${node:+--node-rank "$node"}) || exit 1
else
    [ "$node" -lt "$nodes" ] || fail "found NODE_RANK=$node with NNODES=$nodes; expected 0 to $((nodes - 1))"
    # One name for each machine is all that is needed: they are told apart by their ranks.
    copies=$(printf ",$first%.0s" $(seq "$nodes"))
    found=$("$python" "$home/launch/_network.py" "${copies#,}" --node-rank "$node") || exit 1
fi
{ read -r node; read -r own; read -r interface; } <<< "$found"
is_host=false
[ "$node" -ne 0 ] || is_host=true
ranks=$(ranks_per_node "$ranks" 1)
set_environment "$ranks" "$interface"
# The rendezvous must not guess by the machine's name whether it is the first host (is_host), nor
# which address the others reach it by (--local-addr).
run_or_print "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$id" \
    --rdzv-conf "is_host=$is_host,join_timeout=$timeout" --local-addr "$own" "$@"
