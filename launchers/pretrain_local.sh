#!/usr/bin/env bash
# Pretrain on this machine, through failures:
#   pretrain_local.sh PRESET DATASET OUT [--section.field VALUE ...] [--num_ranks N] [--dry-run]
# It goes on from the last checkpoint in OUT, and is started again up to RESTARTS times in a row (default: 5).
# Exit code 85: it was asked to stop (SIGTERM, SIGUSR1) and has saved; the same command goes on.
set -euo pipefail
if (($# < 3)); then
  echo "usage: $0 PRESET DATASET OUT [options of hmoe pretrain]" >&2
  exit 2
fi
exec hmoe pretrain --restarts "${RESTARTS:-5}" --config "$1" --data.path "$2" --run.out "$3" --run.resume auto "${@:4}"
