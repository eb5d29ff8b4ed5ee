#!/usr/bin/env bash
# A real Slurm of three nodes on this machine: munged, slurmctld and three slurmd, with everything they write in DIR.
#
#   apt-get install -y slurm-wlm munge     (22.05 and newer; the daemons need root)
#   tests/slurm/local_cluster.sh start DIR
#   export SLURM_CONF=DIR/slurm.conf       then sbatch, srun, squeue, scontrol and scancel work as on a cluster
#   tests/slurm/local_cluster.sh stop DIR  ends only what start began
#
# The nodes are called 127.0.0.1 to 127.0.0.3, so that their names are addresses that every Linux has. A requeued job
# starts again after two minutes, or at once with `scontrol update JobId=JOB StartTime=now`.
set -euo pipefail
action=${1-} dir=$(realpath -m "${2:?usage: $0 start|stop DIR}")
export SLURM_CONF=$dir/slurm.conf

# Below those that Linux gives to connections: none takes it before the daemon does.
free_port() { shuf -i 10000-32767 -n 1; }

case $action in
start)
    mkdir -p "$dir"/{state,munge,spool-127.0.0.{1,2,3}}
    chmod 755 "$dir" "$dir/munge"
    (umask 077; head -c 128 /dev/urandom >"$dir/munge/key")
    munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --force
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld-own.pid
SlurmdPidFile=$dir/slurmd-%n-own.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# The nodes have more CPUs than this machine, so that three small jobs run side by side.
SlurmdParameters=config_overrides
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=30
ReturnToService=2
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname=$(hostname) Port=$(free_port) CPUs=4 State=UNKNOWN
NodeName=127.0.0.2 NodeAddr=127.0.0.1 NodeHostname=$(hostname) Port=$(free_port) CPUs=4 State=UNKNOWN
NodeName=127.0.0.3 NodeAddr=127.0.0.1 NodeHostname=$(hostname) Port=$(free_port) CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
    setsid slurmctld -D >"$dir/slurmctld.out" 2>&1 &
    echo $! >"$dir/slurmctld.pid"
    for node in 127.0.0.{1,2,3}; do
        setsid slurmd -D -N "$node" >"$dir/$node.out" 2>&1 &
        echo $! >"$dir/$node.pid"
    done
    for _ in $(seq 240); do
        [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 3 ]] && exit 0
        sleep 0.5
    done
    echo "the three nodes did not become idle in 120 s; see the logs in $dir" >&2
    exit 1
    ;;
stop)
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 40); do
        [[ -z $(squeue -h 2>/dev/null) ]] && break
        sleep 1
    done
    for pid in "$dir"/{127.0.0.{1,2,3},slurmctld}.pid "$dir/munge/pid"; do
        [[ -f $pid ]] && kill "$(cat "$pid")" 2>/dev/null || true
    done
    ;;
*)
    echo "usage: $0 start|stop DIR" >&2
    exit 2
    ;;
esac
