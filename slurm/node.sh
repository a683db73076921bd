#!/usr/bin/env bash
# node.sh ATTEMPT ARGUMENT...: the one task of a node; started by srun in common.sh. Runs `torchrun ARGUMENT...`.
#
# USR1 (from the batch shell) and TERM (from Slurm) become TERM for the ranks alone, which save a checkpoint and exit 0. Not for
# torchrun: it would kill the ranks after 30 s, and before torch 2.9 that cannot be changed. Where Slurm signals every process
# of a step (proctrack/linuxproc), USR1 must not end torchrun and loader processes: they ignore it.
# shellcheck disable=SC2317 # stop and ranks are called by traps
# shellcheck source=slurm/common.sh
source "$(dirname "$0")/common.sh"
attempt=$1
shift
if [ -n "$SETUP" ]; then
    set +u # such files are rarely written for it
    # shellcheck source=/dev/null
    source "$SETUP"
    set -u
fi

nodes=$SLURM_STEP_NUM_NODES last=$((RANKS_PER_NODE - 1))
# Every rank has its own logs. What the first says, and the last, which reports in Megatron-LM, is in their node's log too.
tee=''
[ "$SLURM_NODEID" != 0 ] || tee=0:3
[ "$SLURM_NODEID" != $((nodes - 1)) ] || tee=${tee:+$tee,}$last:3
options=(--nnodes "$nodes" --node-rank "$SLURM_NODEID" --nproc-per-node "$RANKS_PER_NODE" --max-restarts 0
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --log-dir "$attempt/node-$SLURM_NODEID" --redirects 3)
[ -z "$tee" ] || options+=(--tee "$tee")

# Each rank on the CPUs of its GPU's NUMA node, where this torch's torchrun can do that.
torchrun_source=$("$PYTHON" -c 'import importlib.util as u, os; print(os.path.join(*u.find_spec("torch").submodule_search_locations, "distributed/run.py"))')
if [ -e /dev/nvidia0 ] && grep -q -e '"--numa-binding"' "$torchrun_source"; then options+=(--numa-binding node); fi

ranks() { # processes whose parent is torchrun
    grep -ls "^PPid:[[:space:]]*$torchrun\$" /proc/[0-9]*/status | cut -d/ -f3 | tr '\n' ' ' || true
}

stop() {
    interrupted=1
    [ -z "$stopping" ] || return 0 # Slurm may signal twice, and a rank that has saved no longer listens
    stopping=1
    [ "$1" != USR1 ] || : >"$attempt/stopped"
    local found
    found=$(ranks)
    echo "node.sh: $1, passed on to ${found:-torchrun, which has no ranks yet}"
    # shellcheck disable=SC2086 # several process ids
    kill -TERM ${found:-$torchrun} 2>/dev/null || true # some may have ended since
}

stopping=''
(
    trap '' USR1
    exec "$PYTHON" -m torch.distributed.run "${options[@]}" "$@"
) &
torchrun=$!
trap 'stop USR1' USR1
trap 'stop TERM' TERM
wait_for "$torchrun"
exit "$status"
