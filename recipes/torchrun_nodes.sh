#!/usr/bin/env bash
# Several machines; run it on each of them: bash recipes/torchrun_nodes.sh SCRIPT [ARGUMENTS...]
#
# FIRST_NODE      name or address of the machine with number 0
# NODES           number of machines
# NODE_RANK       number of this machine, from 0 (default: what Slurm or an Indexed Job of Kubernetes says)
# RANKS_PER_NODE  ranks on each machine (default 4)
# PORT            a port that is free on the first machine (default 29500)
set -euo pipefail

NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:?set NODE_RANK to the number of this machine, from 0}}}"
# Ranks that are left when the job is told to end have this long; torch's own 30 s are longer than most schedulers wait.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-10}"

exec torchrun \
  --nnodes "${NODES:?set NODES to the number of machines}" \
  --node-rank "$NODE_RANK" \
  --nproc-per-node "${RANKS_PER_NODE:-4}" \
  --master-addr "${FIRST_NODE:?set FIRST_NODE to the name of the first machine}" \
  --master-port "${PORT:-29500}" \
  --max-restarts 0 \
  "$@"
