#!/usr/bin/env bash
# A Slurm of its own on this machine, for trying things out. It needs Debian's or Ubuntu's slurm-wlm package, and no munge or root beyond installing.
#   mini_slurm.sh install          apt-get the packages (as root)
#   mini_slurm.sh start DIR [N]    N nodes (default 2), n1, n2, ...; everything that they write lies in DIR
#   mini_slurm.sh stop DIR
# After start: export SLURM_CONF=DIR/slurm.conf; then sinfo, sbatch and scontrol work. PORT is the first of N + 1 ports (default 26817).
# WHILE_PID=ID stops it when that process has ended, however it ended.
# Partitions: main, whose jobs are preempted with GRACE seconds of grace (default 10), and high, which preempts them.
set -euo pipefail
usage() { sed -n 's/^#   mini_slurm/mini_slurm/p' "$0" >&2; exit 2; }

install() {
  apt-get update -qq
  # Without policy-rc.d, installing would start the daemons with the distribution's own configuration.
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm
}

configure() {
  local port="${PORT:-26817}" host user
  host="$(hostname -s)" user="$(id -un)"
  cat <<CONF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/none
CredType=cred/none
# A restart waits until the credentials of the last start have expired: two minutes by default.
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
# Nodes may say that they have more than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=${KILL_WAIT:-5}
SlurmdTimeout=${SLURMD_TIMEOUT:-30}
# A busy machine answers late, and must not be taken for one that is gone.
MessageTimeout=60
CONF
  for (( node = 1; node <= nodes; node++ )); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$(( port + node )) CPUs=2 RealMemory=1000"
  done
  echo "PartitionName=main Nodes=n[1-$nodes] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-10}"
  echo "PartitionName=high Nodes=n[1-$nodes] PriorityTier=100 PreemptMode=OFF"
}

start() {
  mkdir -p "$dir"/{state,log,run}
  configure > "$dir/slurm.conf"
  [ -z "${WHILE_PID:-}" ] || stop_with "$WHILE_PID"
  export SLURM_CONF="$dir/slurm.conf"
  # A daemon keeps what it inherits: a terminal, or a pipe that its starter reads until it is closed.
  slurmctld -f "$SLURM_CONF" </dev/null >/dev/null 2>&1
  for (( node = 1; node <= nodes; node++ )); do
    mkdir -p "$dir/spool.n$node"
    slurmd -f "$SLURM_CONF" -N "n$node" </dev/null >/dev/null 2>&1
  done
  for (( attempt = 0; attempt < 480; attempt++ )); do
    [ "$(sinfo --noheader --Node --partition main --format %T 2>/dev/null | grep -c '^idle$')" = "$nodes" ] && return
    sleep 0.25
  done
  echo "mini_slurm.sh: the nodes did not become idle; see $dir/log" >&2
  return 1
}

# Daemons, and the programs that watch over job steps, outlive each other: so jobs first, and then everything that runs with this configuration.
stop() {
  export SLURM_CONF="$dir/slurm.conf"
  { timeout 10 squeue --noheader --format %A 2>/dev/null || true; } | sort -u | while read -r job; do
    timeout 5 scancel "$job" || true
    timeout 5 scancel --full --signal=KILL "$job" 2>/dev/null || true
  done
  for (( attempt = 0; attempt < 40; attempt++ )); do
    [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
    sleep 0.25
  done
  for file in "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid"; do
    [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
  for (( attempt = 0; attempt < 40; attempt++ )); do
    [ -n "$(ours)" ] || return 0
    sleep 0.25
  done
  ours | xargs -r kill -KILL 2>/dev/null || true
}

# Slurm's own processes that run with this configuration.
ours() {
  for process in $(pgrep '^slurm' || true); do
    ! tr '\0' '\n' 2>/dev/null <"/proc/$process/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" || echo "$process"
  done
}

# In a session of its own, so that what kills the starter's whole group spares it.
stop_with() {
  # shellcheck disable=SC2016  # the inner shell expands it
  setsid bash -c 'tail --pid="$1" -f /dev/null; exec "$0" stop "$2"' "$(realpath "$0")" "$1" "$dir" </dev/null >/dev/null 2>&1 &
}

[ "$#" -ge 1 ] || usage
dir="${2:-}" nodes="${3:-2}"
case "$1" in
  install) install ;;
  start | stop) [ -n "$dir" ] || usage; "$1" ;;
  *) usage ;;
esac
