#!/usr/bin/env bash
# cluster.sh up|down DIR: a real Slurm on this machine, with N virtual nodes (NODES, default 4) of two pretended GPUs each, as root
# and without systemd. `up` ends with the line `export SLURM_CONF=...`. Everything it makes lies in DIR and goes with `down`.
#
# The partition `urgent` takes nodes from `main`, whose jobs are told (USR1), have GraceTime seconds, and wait their turn again.
set -euo pipefail
action=${1:?up or down} dir=${2:?a folder} nodes=${NODES:-4} host=$(hostname -s)
dir=$(mkdir -p "$dir" && realpath "$dir")
export SLURM_CONF=$dir/slurm.conf

stop_daemon() { # PIDFILE: TERM, and KILL after 10 s
    local pid
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    rm -f "$1"
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        [ -e "/proc/$pid" ] && ! grep -q 'State:.Z' "/proc/$pid/status" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

down() {
    local pidfile
    if [ -s "$dir/slurmctld.pid" ]; then
        timeout 20 scancel --user="$(id -un)" || true
        for _ in $(seq 20); do
            [ -n "$(timeout 5 squeue -h || true)" ] || break
            sleep 1
        done
    fi
    for pidfile in "$dir"/slurmd.*.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do stop_daemon "$pidfile"; done
    rm -rf "$dir"/{state,munge.key,munge.seed,munge.sock.lock,slurm.conf,gres.conf} "$dir"/spool.*
}

install() {
    command -v slurmctld slurmd munged >/dev/null && return
    command -v apt-get >/dev/null || { echo "cluster.sh: no slurmctld, and no apt-get to install it" >&2 && exit 1; }
    [ "$(id -u)" = 0 ] || { echo "cluster.sh: no slurmctld; only root can install and run it" >&2 && exit 1; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}

down
[ "$action" = up ] || exit 0
install >&2
mkdir -p "$dir/state" "$dir/log"
chmod 755 "$dir"
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
port=$((30000 + $$ % 2000)) # below the ephemeral ports, above the scripts' own; another cluster on this machine has others
cat >"$SLURM_CONF" <<CONF
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthInfo=socket=$dir/munge.sock,cred_expire=5
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=30
KillWait=20
MinJobAge=86400
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=4 Gres=gpu:2
PartitionName=main Nodes=n[1-$nodes] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=240
PartitionName=urgent Nodes=n[1-$nodes] State=UP PriorityTier=2 PreemptMode=OFF
CONF
printf "NodeName=n[1-$nodes] Name=gpu File=/dev/%s\n" null zero >"$dir/gres.conf" # any two device files: GPUs are counted here, not used
slurmctld
for i in $(seq "$nodes"); do slurmd -N "n$i"; done
for _ in $(seq 150); do
    [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ] && break
    sleep 0.2
done
timeout 30 srun -N"$nodes" -n"$nodes" true || { sinfo -N -l && tail -n 20 "$dir"/log/*.log && exit 1; } >&2
echo "export SLURM_CONF=$SLURM_CONF"
