#!/usr/bin/env bash
# Starts a training script that survives the loss of ranks: all are started again, on what is left.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$home/launch/_environment.sh"
. "$home/launch/_options.sh"
. "$home/launch/_ranks.sh"

usage() {
    cat <<'HELP'
usage: bash launch/elastic.sh [options] [SCRIPT [arguments]]
       bash launch/elastic.sh [options] -m MODULE [arguments]

Starts SCRIPT (default: examples/digits.py) so that it survives failures: when a rank dies, torchrun
starts all ranks again, at most --max-restarts times, on the machines that are left. SCRIPT has to
continue from its last checkpoint. Run the same command on every machine; they may come and go.

  --nodes MIN:MAX      how many machines there may be (default: 1:1, this one alone)
  --max-restarts N     how often the ranks may be started again (default: 3)
  --endpoint HOST[:PORT]
                       where the machines meet: one that stays (port 29400 by default); needed if
                       MAX is more than 1
  --id NAME            tells jobs at one endpoint apart (default: jddist)
  --nproc N            ranks on each machine (default: one for each GPU, or 2 without one)
  --dry-run            print the command instead of running it
  --help

environment variables:
  JDDIST_ENDPOINT, JDDIST_NPROC
                       as --endpoint and --nproc
  JDDIST_RUN_PYTHON    the Python of the ranks (default: that of .venv, else python3)
  OMP_NUM_THREADS, NCCL_DEBUG, GLOO_SOCKET_IFNAME
                       set to cores / ranks, WARN and the interface towards the endpoint, unless
                       they are set
  PET_...              torchrun's own options, e.g. PET_LOG_DIR=logs for --log-dir logs
HELP
}

dry_run='' ranks='' nodes=1:1 restarts=3 endpoint=${JDDIST_ENDPOINT:-} id=jddist
read_options '--dry-run=dry_run' \
    '--nodes=nodes --max-restarts=restarts --endpoint=endpoint --id=id --nproc=ranks' \
    -- "$@"
set -- "${script[@]}"
[ $# -gt 0 ] || set -- "$home/examples/digits.py"
check_script "$@"

[[ $nodes =~ ^([1-9][0-9]*):([1-9][0-9]*)$ ]] || fail "found --nodes '$nodes'; expected MIN:MAX, for example 2:4"
least=${BASH_REMATCH[1]} most=${BASH_REMATCH[2]}
[ "$least" -le "$most" ] || fail "found --nodes '$nodes'; expected MIN to be at most MAX"
number --max-restarts "$restarts" 0
if [ -z "$endpoint" ]; then
    [ "$most" -eq 1 ] || fail "found no endpoint with --nodes $nodes; expected the machine where all meet. Pass --endpoint HOST[:PORT], or set JDDIST_ENDPOINT"
    endpoint=localhost:0
fi

choose_python
ranks=$(ranks_per_node "$ranks" 2)
interface='' address=()
if [ "$most" -gt 1 ]; then
    host=${endpoint%:*}
    found=$("$python" "$home/launch/_network.py" "$host" --any) || exit 1
    { read -r node; read -r own; read -r interface; } <<< "$found"
    is_host=false
    [ "$node" -ne 0 ] || is_host=true
    address=(--rdzv-conf "is_host=$is_host" --local-addr "$own")
fi
set_environment "$ranks" "$interface"
# Otherwise the ranks of a restart may read the addresses of those before it (torch 2.13).
set_default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
run_or_print "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" \
    --max-restarts "$restarts" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id" \
    "${address[@]}" "$@"
