#!/usr/bin/env bash
# Pretrain on this machine, through failures: pretrain_local.sh --config FILE|PRESET --data.path DIR --run.out DIR ...
# It goes on from the last checkpoint in run.out, and is started again up to RESTARTS times in a row (default: 5).
# Exit code 85: it was asked to stop (SIGTERM, SIGUSR1) and has saved; the same command goes on.
set -euo pipefail
exec hmoe pretrain --restarts "${RESTARTS:-5}" "$@"
