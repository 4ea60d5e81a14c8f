#!/usr/bin/env bash
# One node or many: launch/torchrun.sh CONFIG.yaml [a.b=c ...]
#   NPROC_PER_NODE  processes per node (default: GPUs of the node, or 2 without)
#   NNODES          nodes (default 1); then also RDZV_ENDPOINT=host:port of the first node and RDZV_ID, a name for the job
#   RDZV_IS_HOST    1 on the node that RDZV_ENDPOINT names, 0 on the others: only where torchrun cannot tell by the address
#   LOCAL_ADDR      this node's address for the others: only where its host name does not resolve to it
#   LOG_DIR         a folder for the output of every process, beside what is printed
#   MAX_RESTARTS    how often a failed job starts again, from its newest checkpoint (default 0)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source=launch/env.sh
source "$here/env.sh"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nproc="${NPROC_PER_NODE:-$(( gpus > 0 ? gpus : 2 ))}"
if [ "${NNODES:-1}" = 1 ]; then
  rendezvous=(--standalone)
else
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-fusiontrain}" --rdzv-endpoint "${RDZV_ENDPOINT:?is needed with NNODES: host:port of the first node, the same on all}")
  [ -z "${RDZV_IS_HOST:-}" ] || rendezvous+=(--rdzv-conf "is_host=$RDZV_IS_HOST")
  [ -z "${LOCAL_ADDR:-}" ] || rendezvous+=(--local-addr "$LOCAL_ADDR")
fi
logs=()
[ -z "${LOG_DIR:-}" ] || logs=(--log-dir "$LOG_DIR" --tee 3)
# Ctrl-\ asks the ranks what they do; it must not end their agent.
trap '' QUIT
# fusiontrain.cli.agent is torchrun that also ends, a minute later, when the network to the rendezvous is cut; torchrun alone would hang.
# `--` because torchrun would take the program's options for abbreviations of its own.
exec python -m fusiontrain.cli.agent "${rendezvous[@]}" "${logs[@]}" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2 -m -- fusiontrain train "$@"
