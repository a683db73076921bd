#!/usr/bin/env bash
# What the scripts of a job share; they source it. docs/slurm.md explains how they are used.
#
# Settings, all from the environment (`export` them before sbatch, or sbatch --export=ALL,NAME=value):
#   PYTHON            interpreter with exact_megatron, on the nodes or in the container     [python]
#   SETUP             file that every node sources first: module load, activate, ...        [none]
#   RANKS_PER_NODE    ranks of one node                                                     [its GPUs, else 1]
#   CONTAINER_IMAGE   image for pyxis/enroot: a .sqsh file or registry#name                 [no container]
#   CONTAINER_MOUNTS  FROM:TO,... for data and checkpoints; the current, the run's and these scripts' folders are mounted [none]
#   MAX_CRASHES       crashes without a newer checkpoint between them after which the job gives up [3]
#   MIN_FREE_GB       free space that the run's folder must have before the ranks start     [20]
set -eEuo pipefail
trap 'say "${BASH_SOURCE[0]##*/}:$LINENO ends with exit code $?: $BASH_COMMAND" >&2' ERR

: "${PYTHON:=python}" "${SETUP:=}" "${CONTAINER_IMAGE:=}" "${CONTAINER_MOUNTS:=}" "${MAX_CRASHES:=3}" "${MIN_FREE_GB:=20}"
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
export PYTHON SETUP RANKS_PER_NODE
readonly REFUSED=2 # exit code of exact-megatron for input that no second try makes better
# shellcheck disable=SC2016 # expanded on the node
readonly ONE_PROCESS='[ -z "$SETUP" ] || source "$SETUP"; exec "$PYTHON" "$@"'

say() { printf '%s slurm: %s\n' "$(date '+%F %T')" "$*"; }

refuse() {
    say "$*" >&2
    exit "$REFUSED"
}

# Every line may be overruled by exporting the variable before sbatch.
set_environment() {
    # Tensor, sequence and context parallelism overlap a collective with a GEMM: one hardware queue keeps them in launch order.
    # FSDP wants the default of 8: export CUDA_DEVICE_MAX_CONNECTIONS=8.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # torchrun would set 1 and leave the data loader's and the optimizer's CPU work on one core.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    # Long documents vary the activations' sizes: without this, PyTorch's caching allocator fragments until it runs out of memory.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # Only what goes wrong. INFO prints rings, transports and HCAs; use it once on a new cluster (look for NET/IB, not NET/Socket).
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # InfiniBand retries for 2^22 x 4 us = 17 s before it gives up on a link; the default of 20 (4 s) is short for a switch's failover.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # Left to the cluster: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the interface that MASTER_ADDR is on, where NCCL or gloo
    # picks a wrong one), NCCL_IB_HCA (the HCAs of the compute fabric, where storage has its own), NCCL_NVLS_ENABLE=0 (frees
    # GPU memory, slower all-reduce).

    MASTER_ADDR=$(first_address)
    MASTER_PORT=$(free_port)
    export MASTER_ADDR MASTER_PORT
}

# Name of the job's first node, or its address where node names do not resolve.
first_address() {
    local host
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    getent hosts "$host" >/dev/null || host=$(scontrol show node "$host" -o | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    [ -n "$host" ] || refuse "no address for the first node of $SLURM_JOB_NODELIST"
    printf '%s\n' "$host"
}

# A port that other jobs do not choose (10000 to 29999 by job id: below the ephemeral ports), the next where something listens.
free_port() {
    local port=$((10000 + SLURM_JOB_ID % 20000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    printf '%s\n' "$port"
}

# wait_for PID: sets `status`. A trap that sets `interrupted` ends bash's `wait` early.
wait_for() {
    interrupted=1
    while [ -n "$interrupted" ]; do
        interrupted=''
        wait "$1" && status=0 || status=$?
    done
}

# check_folder DIR SO_FAR: make it, write to it, look at its space; a problem is one line, with what has been done so far, and the end.
check_folder() {
    local dir=$1 so_far=$2 probe free error
    error=$(mkdir -p "$dir" 2>&1) || refuse "cannot make the folder $dir: $error. $so_far; give another folder for the run"
    probe=$dir/.probe.${SLURM_JOB_ID:-$$}
    error=$( (head -c 65536 /dev/zero >"$probe") 2>&1) || {
        rm -f "$probe"
        refuse "cannot write to $dir: $error. $so_far; free space or quota there, or give another folder for the run"
    }
    rm "$probe"
    free=$(df -Pk "$dir" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$MIN_FREE_GB" ] ||
        refuse "$dir has $free GB free, MIN_FREE_GB=$MIN_FREE_GB. $so_far; free space, or lower MIN_FREE_GB to what checkpoints need"
}

# value KEY DEFAULT ARGUMENT...: the last KEY=value among the arguments, without Hydra's leading +.
value() {
    local key=$1 found=$2 argument
    shift 2
    for argument; do
        while [ "${argument#+}" != "$argument" ]; do argument=${argument#+}; done
        case $argument in "$key="*) found=${argument#*=} ;; esac
    done
    printf '%s\n' "$found"
}

# The newest checkpoint of the run's folder; scripts of other hosts define their own after sourcing this file.
newest_checkpoint() {
    find "$1/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.partial' -printf '%f\n' 2>/dev/null | sort | sed -n '$p' || true
}

# The newest checkpoint, in words.
progress() {
    local newest
    newest=$(newest_checkpoint "$1")
    printf '%s\n' "${newest:-the start}"
}

# step_command FOLDER: sets `command` to srun, in the container if there is one.
step_command() {
    # No --cpus-per-task: a step then has all CPUs of the job, which is --exclusive; node.sh binds ranks to their GPU's NUMA node.
    command=(srun --cpu-bind=none)
    local run
    run=$(realpath "$1")
    [ -z "$CONTAINER_IMAGE" ] || command+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
        --container-mounts="$PWD:$PWD,$run:$run,$SCRIPTS:$SCRIPTS${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
}

# run_once FOLDER ARGUMENT...: `$PYTHON ARGUMENT...` as one process, on the first node of the job, or here without a job.
run_once() {
    local command=()
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        step_command "$1"
        command+=(--nodes=1 --ntasks=1)
    elif [ -n "$CONTAINER_IMAGE" ]; then
        refuse "CONTAINER_IMAGE is for Slurm with pyxis. Without Slurm start this script inside the container, and unset CONTAINER_IMAGE"
    fi
    shift
    "${command[@]}" bash -c "$ONE_PROCESS" - "$@"
}

# All steps, not this shell. Again and again, since a step that is just starting does not hear it; node.sh listens once.
stop_ranks() {
    asked_to_stop=1 interrupted=1
    [ -n "$stopper" ] || {
        while :; do
            scancel --signal=USR1 "$SLURM_JOB_ID" || true
            sleep 20
        done &
        stopper=$!
    }
}

# run_ranks FOLDER ARGUMENT...: one torchrun a node with these arguments, supervised. Does not return unless the run has finished.
#
# FOLDER/slurm/JOB.TRY/ has a log for each node and each rank; FOLDER/slurm/finished holds the arguments of a finished run.
run_ranks() {
    asked_to_stop='' ended='' stopper=''
    trap 'asked_to_stop=1' USR1
    local folder=$1 state attempt status command
    shift
    state=$folder/slurm
    check_folder "$state" "Nothing was started"
    attempt=$state/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    mkdir -p "$attempt"
    ln -sfn "${attempt##*/}" "$state/latest"
    rm -f "$state/finished"
    set_environment
    say "job $SLURM_JOB_ID try ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, $RANKS_PER_NODE ranks a node, $MASTER_ADDR:$MASTER_PORT," \
        "from $(progress "$folder"). Logs: $attempt"
    step_command "$folder"
    trap stop_ranks USR1
    trap 'ended=1; interrupted=1; requeue_after_time_limit' TERM # Slurm has told the steps
    [ -z "$asked_to_stop" ] || requeue "stopped by a signal at $(progress "$folder")"
    "${command[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 --output="$attempt/node-%n.log" bash "$SCRIPTS/node.sh" "$attempt" "$@" &
    wait_for $!
    trap '' USR1
    [ -z "$stopper" ] || kill "$stopper"
    [ "$status" = 0 ] || sleep 2 || true # if Slurm ends the job, for a lost node perhaps, it says so now

    if [ -n "$ended" ]; then
        say "ended from outside (scancel, preemption, time limit, lost node), at $(progress "$folder")"
        exit 143
    fi
    [ ! -e "$attempt/stopped" ] || asked_to_stop=1 # `scancel --signal=USR1 JOB` reaches the ranks and not this shell
    if [ -z "$asked_to_stop" ] && [ "$status" = 0 ]; then
        rm -f "$state/crashes"
        printf '%s\n' "$*" >"$state/finished"
        say "finished at $(progress "$folder")"
        return
    fi
    local failures
    failures=$(root_causes "$attempt")
    if [ -n "$asked_to_stop" ] && ! grep -qv '^[^ ]* -15 ' <<<"${failures:-none -15 }"; then
        requeue "stopped by a signal at $(progress "$folder")"
    fi
    after_crash "$folder" "$attempt" "$status" "$failures"
}

# root_causes ATTEMPT: for every torchrun that failed, "TIME EXITCODE LOCAL_RANK NODE_LOG" of its first failed rank, first first.
root_causes() {
    local log
    for log in "$1"/node-*.log; do
        [ -f "$log" ] || continue
        awk -v log_file="$log" '
            /Root Cause \(first observed failure\)/ { found = 1 }
            found && $1 == "time" { time = $3 }
            found && $1 == "rank" { rank = $5; sub(/\)/, "", rank) }
            found && $1 == "exitcode" { print time, $3, rank, log_file; found = 0 }' "$log"
    done | sort -k1,1 -k2,2n
}

# after_crash FOLDER ATTEMPT STATUS FAILURES: requeue, or end the job when trying again is no use.
after_crash() {
    local folder=$1 attempt=$2 status=$3 failures=$4 reason code
    # A full disk has no room for the reason either.
    check_folder "$folder/slurm" "The ranks ended with an error, at $(progress "$folder")"
    reason=$(explain "$attempt" "$status" "$failures")
    say "$reason"
    code=$(awk 'NR == 1 { print $2 }' <<<"$failures")
    # Errors of the system are worth another try, but for: no such file, no permission, a file in a folder's place, no space,
    # read-only, quota.
    if [ "${code:-}" = "$REFUSED" ] && ! grep '\[Errno ' <<<"$reason" | grep -qvE '\[Errno (2|13|17|20|28|30|122)\]'; then
        say "not tried again: the ranks refused to go on, and would again"
        exit "$REFUSED"
    fi
    try_again "$folder" crash
}

# try_again FOLDER WHAT: requeue, or give up after MAX_CRASHES without a newer checkpoint between them.
try_again() {
    local folder=$1 what=$2 now crashes=0 last=''
    now=$(progress "$folder")
    [ ! -s "$folder/slurm/crashes" ] || read -r crashes last <"$folder/slurm/crashes"
    [ "$last" = "$now" ] || crashes=0
    crashes=$((crashes + 1))
    printf '%s %s\n' "$crashes" "$now" >"$folder/slurm/crashes"
    if [ "$crashes" -ge "$MAX_CRASHES" ]; then
        say "$what $crashes at $now. Not tried again: $crashes without a newer checkpoint (MAX_CRASHES=$MAX_CRASHES)"
        rm -f "$folder/slurm/crashes" # whoever submits it again has looked at it
        exit 1
    fi
    requeue "$what $crashes of $MAX_CRASHES at $now"
}

# explain ATTEMPT STATUS FAILURES: which rank failed first, how, and the end of what it said.
explain() {
    local attempt=$1 status=$2 failures=$3 time code rank log how
    if [ -z "$failures" ]; then
        printf 'srun ended with %s and no torchrun says why. The end of the logs:\n' "$status"
        tail -n 5 "$attempt"/node-*.log 2>/dev/null || echo "(there are none: see what srun says above)"
        return
    fi
    read -r time code rank log <<<"$failures"
    how="exit code $code"
    [ "$code" -ge 0 ] || how="signal ${code#-}"
    [ "$code" != -9 ] || how+=" (often the kernel, out of memory: see dmesg on the node)"
    printf 'local rank %s of %s failed first, at %s, with %s. The end of its log:\n' "$rank" "$(basename "$log" .log)" "$time" "$how"
    # A refusal is one line; of anything else the end of the traceback is wanted.
    find "${log%.log}" -path "*/$rank/stderr.log" -exec cat {} + | grep -v '^ *$' >"$attempt/failed.log" || true
    grep '^exact-megatron[a-z -]*: ' "$attempt/failed.log" || tail -n 12 "$attempt/failed.log"
}

# Where the time between the signal and the limit was too short to save: at once, since Slurm kills this shell in KillWait seconds.
# What else Slurm ends it requeues itself, unless the user cancelled it.
requeue_after_time_limit() {
    local job
    [ -n "$asked_to_stop" ] || return 0
    trap '' TERM
    job=$(scontrol show job "$SLURM_JOB_ID" -o)
    case $job in *Reason=TimeLimit*)
        say "the time limit came before the ranks had saved: give --signal=B:USR1@SECONDS more of them"
        try_again "$folder" timeout
        ;;
    esac
}

requeue() {
    local error
    trap '' TERM # which Slurm sends at once, to scontrol too
    if error=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
        say "$1; requeued"
        exit 0
    fi
    say "$1; cannot requeue ($error): submit it again, it goes on from there"
    exit 1
}
