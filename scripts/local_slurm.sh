#!/usr/bin/env bash
# local_slurm.sh {install|start|stop|status} [FOLDER]: a Slurm of one machine, for tests.
# install: the packages (Debian or Ubuntu, as root). start prints the line that lets other commands find it.
# Everything lives in FOLDER (default ./.slurm): configuration, state, logs, sockets. No systemd, no cgroups.
# LOCAL_SLURM_NODES: how many nodes the machine stands for (default 1). LOCAL_SLURM_CPUS: cores of each (default: all).
set -euo pipefail

command=${1:-}
folder=$(realpath -m "${2:-.slurm}")
export SLURM_CONF=$folder/slurm.conf
nodes=${LOCAL_SLURM_NODES:-1}
packages=(slurmctld slurmd slurm-client munge)

die() { echo "local_slurm.sh: $*" >&2; exit 1; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
name() { if [ "$1" = 1 ]; then hostname -s; else echo "$(hostname -s)-$1"; fi; }  # of a node; that of the first resolves
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

install() {
  command -v apt-get >/dev/null || die "apt-get not found: install ${packages[*]} by other means"
  [ "$(id -u)" = 0 ] || die "installing ${packages[*]} needs root"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"
}

configure() {
  local host memory i
  host=$(hostname -s)
  memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
  # cred_expire: a requeued job waits for it, 120 s by default. MinJobAge: how long Slurm knows what became of a job.
  cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=10000,requeue_delay=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=2
PropagateResourceLimits=NONE
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
NodeName=DEFAULT CPUs=${LOCAL_SLURM_CPUS:-$(nproc)} RealMemory=$memory
CONF
  for i in $(seq "$nodes"); do echo "NodeName=$(name "$i") NodeAddr=127.0.0.1 NodeHostname=$host Port=$(free_port) State=UNKNOWN"; done >>"$SLURM_CONF"
}

start() {
  local needed i
  for needed in slurmctld slurmd munged squeue; do
    command -v $needed >/dev/null || die "$needed not found: $0 install"
  done
  [ "$(id -u)" = 0 ] || die "slurmd needs root"
  mkdir -p "$folder"/{munge,state,spool,log}
  chmod 755 "$folder" "$folder/munge"
  chmod 700 "$folder/state"
  [ -s "$folder/key" ] || (umask 077; head -c 128 /dev/urandom >"$folder/key")
  alive "$folder/slurmctld.pid" || configure
  alive "$folder/munge/pid" || munged --key-file="$folder/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" --num-threads=2
  alive "$folder/slurmctld.pid" || slurmctld -f "$SLURM_CONF"
  for i in $(seq "$nodes"); do
    alive "$folder/slurmd-$(name "$i").pid" || slurmd -f "$SLURM_CONF" -N "$(name "$i")"
  done
  for _ in $(seq 100); do
    [ "$(sinfo -h -N -o %t 2>/dev/null | uniq -c | xargs)" = "$nodes idle" ] && { echo "export SLURM_CONF=$SLURM_CONF"; return; }
    sleep 0.1
  done
  tail -n 20 "$folder"/log/*.log >&2
  die "not every node is idle after 10 s; the logs are in $folder/log"
}

stop() {
  local pid file
  scancel -u "$(id -un)" 2>/dev/null || true
  for _ in $(seq 80); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  for file in "$folder"/slurmd-*.pid "$folder"/slurmctld.pid "$folder"/munge/pid; do
    alive "$file" || continue
    pid=$(cat "$file")
    kill "$pid"
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
}

status() {
  local file
  for file in "$folder"/munge/pid "$folder"/slurmctld.pid "$folder"/slurmd-*.pid; do
    if alive "$file"; then echo "${file#"$folder"/}: runs"; else echo "${file#"$folder"/}: does not run"; fi
  done
  alive "$folder/slurmctld.pid" && sinfo && squeue
}

case $command in
  install | start | stop | status) $command ;;
  *) die "say install, start, stop or status, and a folder (default ./.slurm)" ;;
esac
