#!/usr/bin/env bash
# Start a real Slurm cluster on this one machine: slurmctld, virtual nodes (slurmd), slurmrestd, a munged of its own.
#
#   tools/slurm/up.sh DIR [NODES] [PORT] [CPUS]   defaults: 6 nodes n1..n6 of 4 CPUs, ports from 21000 on
#
# Needs root (Slurm changes users) and Debian's packages, installed here if absent. Everything it writes is in DIR.
# slurmrestd listens at DIR/rest/socket and wants a JWT (`scontrol token`); where it cannot be installed, the rest
# goes without. Run again, it starts what is missing. Then: `. DIR/env`. End it with tools/slurm/down.sh DIR.
set -euo pipefail

directory=$(realpath -m "${1:?usage: up.sh DIR [NODES] [PORT] [CPUS]}")
node_count=${2:-6}
port=${3:-21000}
cpus=${4:-4}
packages=(slurmctld slurmd slurm-client munge)
extras=(slurmrestd slurm-wlm-jwt-plugin openssh-server) # the tests start an sshd of their own
export SLURM_CONF=$directory/slurm.conf

fail() {
  echo "slurm: $*" >&2
  tail -qn 5 "$directory"/log/* >&2 2>/dev/null || true
  exit 1
}

runs() { # pid file
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null
}

until_true() { # seconds, command
  local tries=$(($1 * 20))
  shift
  for ((i = 0; i < tries; i++)); do
    "$@" >/dev/null 2>&1 && return 0
    sleep 0.05
  done
  return 1
}

install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" \
    >"$directory/log/packages" 2>&1 </dev/null
}

plugins() { find /usr/lib /usr/lib64 /usr/local/lib -path "*slurm*/$1" -printf '%f\n' 2>/dev/null | sort; }

has_jwt() { [ -n "$(plugins auth_jwt.so)" ]; }

install_packages() {
  command -v slurmctld slurmd salloc munged slurmrestd sshd >/dev/null && has_jwt && return
  command -v apt-get >/dev/null && apt-get update -qq >/dev/null 2>&1
  command -v slurmctld slurmd salloc munged >/dev/null || install "${packages[@]}" || fail "cannot install ${packages[*]}"
  install "${extras[@]}" || echo "slurm: cannot install ${extras[*]}; going on without" >&2
}

write_configuration() {
  [ -s "$SLURM_CONF" ] && return
  local tokens=
  if has_jwt; then
    (umask 077 && head -c 32 /dev/urandom >"$directory/jwt.key")
    tokens="AuthAltTypes=auth/jwt
AuthAltParameters=jwt_key=$directory/jwt.key"
  fi
  cat >"$SLURM_CONF" <<CONF
ClusterName=strait
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket
$tokens
SlurmctldPidFile=$directory/run/slurmctld.pid
SlurmdPidFile=$directory/run/%n.pid
SlurmctldLogFile=$directory/log/slurmctld
SlurmdLogFile=$directory/log/%n
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
MailProg=/bin/true
MpiDefault=none
# Virtual nodes share this machine: no cgroups, no binding of cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
# Cores and memory are counted one by one; a cycle of the scheduler every second or two.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=50000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=2
CompleteWait=0
ReturnToService=2
SlurmctldTimeout=10
DefMemPerCPU=64
GresTypes=gpu
Licenses=matlab:4
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=n[1-$node_count] NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + node_count)) CPUs=$cpus RealMemory=8192 Feature=virtual State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES PriorityTier=50 PreemptMode=OFF DefaultTime=10 MaxTime=1-0
PartitionName=urgent Nodes=ALL PriorityTier=90 PreemptMode=OFF DefaultTime=10 MaxTime=1-0
PartitionName=scavenge Nodes=ALL PriorityTier=10 PreemptMode=CANCEL DefaultTime=10 MaxTime=1-0
PartitionName=returning Nodes=ALL PriorityTier=10 PreemptMode=REQUEUE DefaultTime=10 MaxTime=1-0
CONF
  echo "export SLURM_CONF=$SLURM_CONF" >"$directory/env"
}

start_munge() {
  local home=$directory/munge
  runs "$home/pid" && return
  rm -f "$home"/{socket,socket.lock,pid}
  [ -s "$home/key" ] || (umask 077 && head -c 128 /dev/urandom >"$home/key")
  munged --force --socket="$home/socket" --key-file="$home/key" --pid-file="$home/pid" \
    --log-file="$home/log" --seed-file="$home/seed" 2>/dev/null </dev/null || fail "munged does not start"
  until_true 5 munge -n --socket="$home/socket" || fail "munged does not answer"
}

start_controller() {
  runs "$directory/run/slurmctld.pid" && return
  rm -f "$directory/run/slurmctld.pid"
  slurmctld -f "$SLURM_CONF" </dev/null >/dev/null 2>&1 || fail "slurmctld does not start"
  until_true 15 scontrol ping || fail "slurmctld does not answer"
}

start_nodes() {
  local node
  for node in $(seq -f 'n%g' "$node_count"); do
    runs "$directory/run/$node.pid" && continue
    mkdir -p "$directory/spool/$node"
    slurmd -f "$SLURM_CONF" -N "$node" </dev/null >/dev/null 2>&1 || fail "slurmd of $node does not start"
  done
}

rest_interface() { # without a database slurmrestd starts only with the part that asks slurmctld
  local newest
  newest=$(plugins 'openapi_v0_0_*.so' | tail -n 1) # before 23.11 one plugin for each version
  [ -n "$newest" ] && echo "$newest" | sed 's/openapi_v\(.*\)\.so/openapi\/v\1/; s/_/./g' || echo slurmctld
}

start_rest() {
  command -v slurmrestd >/dev/null && has_jwt || return 0
  runs "$directory/run/slurmrestd.pid" && return
  rm -f "$directory/rest/socket"
  chown nobody "$directory/rest" # it refuses to run as root or as the user of slurmctld
  SLURM_JWT=daemon setsid setpriv --reuid nobody --regid nogroup --clear-groups \
    slurmrestd -f "$SLURM_CONF" -a rest_auth/jwt -s "$(rest_interface)" "unix:$directory/rest/socket" \
    </dev/null >"$directory/log/slurmrestd" 2>&1 &
  echo $! >"$directory/run/slurmrestd.pid"
  until_true 10 test -S "$directory/rest/socket" || fail "slurmrestd does not start"
}

all_ready() { [ "$(sinfo -h -N -p batch -t idle,mix,alloc -o %N | sort -u | wc -l)" -ge "$node_count" ]; }

[ "$(id -u)" = 0 ] || { echo "slurm: only root can start a cluster" >&2; exit 1; }
mkdir -p "$directory"/{run,log,state,spool,munge,rest}
chmod 755 "$directory"
install_packages
write_configuration
start_munge
start_controller
start_nodes
start_rest
until_true 20 all_ready || fail "the nodes do not become idle"
