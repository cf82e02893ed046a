#!/usr/bin/env bash
# End the cluster that tools/slurm/up.sh DIR started: its jobs, its daemons, and DIR itself.
set -uo pipefail

directory=$(realpath -m "${1:?usage: down.sh DIR}")
export SLURM_CONF=$directory/slurm.conf
[ -s "$SLURM_CONF" ] || exit 0

until_gone() { # pid, seconds
  for ((i = 0; i < $2 * 20; i++)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.05
  done
  return 1
}

stop() { # pid file
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill -TERM "$pid" 2>/dev/null && { until_gone "$pid" 8 || kill -KILL "$pid" 2>/dev/null; }
}

if timeout 3 scontrol ping >/dev/null 2>&1; then
  scancel --user=root --full 2>/dev/null
  for ((i = 0; i < 100; i++)); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.05
  done
fi
for file in "$directory"/run/{n*,slurmrestd}.pid; do stop "$file" & done
wait
stop "$directory/run/slurmctld.pid"
stop "$directory/munge/pid"
rm -rf "$directory"
