#!/usr/bin/env bash
# Trains on this machine, or, run on each of several, on all of them together:
#
#   NODES=16 GPUS=8 HOST=node0:29500 launch/torchrun.sh train 1.7b --data.shards /data/shards --out /runs/base
#   NODES=16 GPUS=8 HOST=node0:29500 launch/torchrun.sh distill --from /runs/base --out /runs/map
#
# NODES machines (1), GPUS processes on each (the accelerators here, or 1), HOST a machine of them with a free port. A
# process that dies is started again with all others, RESTARTS times (20), from the last checkpoint. DRY_RUN=1 prints
# the command. All machines must see data and run under the same paths.
set -euo pipefail
nodes=${NODES:-1}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)}
if [ "$gpus" -eq 0 ]; then gpus=1; fi
if [ "$nodes" -gt 1 ] && [ -z "${HOST:-}" ]; then
  echo "HOST must name a machine and a port, such as node0:29500, for NODES=$nodes" >&2
  exit 2
fi
# Each life of the processes gets a store of its own: in a shared one they would find addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
where=(--standalone)
if [ "$nodes" -gt 1 ]; then
  where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HOST" --rdzv-id "${RUN_ID:-catmaps}")
fi
command=(torchrun "${where[@]}" --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-20}" -m catmaps "$@" --restart)
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
