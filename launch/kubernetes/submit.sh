#!/usr/bin/env bash
# Fills in the manifest of a training job, and hands it to kubectl.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$home/launch/_environment.sh"
. "$home/launch/_options.sh"
. "$home/launch/_ranks.sh"

usage() {
    cat <<'HELP'
usage: bash launch/kubernetes/submit.sh --image IMAGE [options] [SCRIPT [arguments]]
       bash launch/kubernetes/submit.sh --image IMAGE [options] -m MODULE [arguments]

Starts SCRIPT (a path inside of the image, default: examples/digits.py) as a PyTorchJob, which needs
Kubeflow's training operator (v1) in the cluster, by: kubectl create -f -

  --image IMAGE        what docker/ builds, in a registry that the cluster can pull from
  --nodes N or MIN:MAX the number of workers, or its bounds (default: 2)
  --nproc N            ranks in each worker (default: its GPUs, or 1 without)
  --gpus N             GPUs for each worker (default: 0)
  --max-restarts N     how often torchrun may start the ranks again (default: 3)
  --namespace NAME     where the job goes (default: that of kubectl's context)
  --dry-run            print the manifest and the command instead of running it
  --help

environment variables:
  JDDIST_IMAGE         as --image
HELP
}

dry_run='' image=${JDDIST_IMAGE:-} nodes=2 ranks='' gpus=0 restarts=3 namespace=''
read_options '--dry-run=dry_run' \
    '--image=image --nodes=nodes --nproc=ranks --gpus=gpus --max-restarts=restarts --namespace=namespace' \
    -- "$@"
set -- "${script[@]}"
[ $# -gt 0 ] || set -- examples/digits.py --out /tmp/digits

[ -n "$image" ] || fail "found no image; expected one that the cluster can pull. Pass --image, or set JDDIST_IMAGE"
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9./:@_-]*$ ]] || fail "found the image '$image'; expected a name such as registry.example.org/jddist:cpu"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "found --nodes '$nodes'; expected a number, or MIN:MAX"
least=${nodes%:*} most=${nodes#*:}
[ "$least" -le "$most" ] || fail "found --nodes '$nodes'; expected MIN to be at most MAX"
number --gpus "$gpus" 0
number --max-restarts "$restarts" 0
ranks=${ranks:-$((gpus > 0 ? gpus : 1))}
number --nproc "$ranks" 1

# The words as a list of JSON, which is YAML too; json is in every Python.
args=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@") || fail "found no python3; expected one to write the arguments down"
resources='{}'
[ "$gpus" -eq 0 ] || resources="{limits: {nvidia.com/gpu: $gpus}}"

# awk gets the values from its environment, where backslashes stay what they are.
manifest=$(
    image=$image least=$least most=$most ranks=$ranks restarts=$restarts args=$args \
        resources=$resources awk '
        BEGIN {
            value["nprocPerNode"] = "\"" ENVIRON["ranks"] "\""
            value["minReplicas"] = ENVIRON["least"]
            value["maxReplicas"] = ENVIRON["most"]
            value["maxRestarts"] = ENVIRON["restarts"]
            value["replicas"] = ENVIRON["most"]
            value["image"] = ENVIRON["image"]
            value["args"] = ENVIRON["args"]
            value["resources"] = ENVIRON["resources"]
        }
        / # submit\.sh$/ {
            key = $1
            sub(/:$/, "", key)
            match($0, /^ */)
            print substr($0, 1, RLENGTH) key ": " value[key]
            next
        }
        !/^#/ { print }
    ' "$home/launch/kubernetes/pytorchjob.yaml"
)

if [ -n "$dry_run" ]; then
    printf '%s\n' "$manifest"
    printf '# %s\n' "kubectl create ${namespace:+--namespace $namespace }-f -"
else
    command -v kubectl > /dev/null || fail "found no kubectl on the PATH; expected it, with access to the cluster. --dry-run prints the manifest"
    kubectl create ${namespace:+--namespace "$namespace"} -f - <<< "$manifest"
fi
