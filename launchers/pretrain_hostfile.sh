#!/usr/bin/env bash
# Pretrain on several machines that this one reaches over ssh without a password, and that share its files:
#   pretrain_hostfile.sh PRESET DATASET OUT --hostfile FILE [--launcher pdsh|openmpi] [--section.field VALUE ...]
# With --dry-run it says what would be started. FILE has lines such as `worker-1 slots=8`. Failures, restarts and exit codes are as with pretrain_local.sh.
set -euo pipefail
if (($# < 3)); then
  echo "usage: $0 PRESET DATASET OUT --hostfile FILE [options of hmoe pretrain]" >&2
  exit 2
fi
exec hmoe pretrain --restarts "${RESTARTS:-5}" --hostfile "${HOSTFILE:-hostfile}" \
  --config "$1" --data.path "$2" --run.out "$3" --run.resume auto "${@:4}"
