#!/usr/bin/env bash
# One machine: bash recipes/torchrun_node.sh SCRIPT [ARGUMENTS...]
# RANKS_PER_NODE is the number of ranks, one for each accelerator (default 4).
set -euo pipefail

# Ranks that are left when the job is told to end have this long; torch's own 30 s are longer than most schedulers wait.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-10}"

exec torchrun --standalone --nproc-per-node "${RANKS_PER_NODE:-4}" --max-restarts 0 "$@"
