#!/usr/bin/env bash
# Run on every node, with its own NODE_RANK:
#   NODE_RANK=0 MAIN_ADDRESS=node1 bash accelerate_offload/two_nodes_torchrun.sh train_pretrain.py --data_path ...
# Strategy: nothing more is DDP, --fsdp full_shard is FSDP2, --deepspeed accelerate_offload/ds_zero3.json is ZeRO-3.
set -euo pipefail
: "${NODE_RANK:?the number of this node: 0, 1, ...}" "${MAIN_ADDRESS:?name or address of node 0}"
# What a signal (SLURM's --signal=TERM@300) stops has this many seconds to finish its step and save, instead of 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --nnodes "${NODES:-2}" --node_rank "$NODE_RANK" --nproc_per_node "${PROCESSES_PER_NODE:-gpu}" \
  --master_addr "$MAIN_ADDRESS" --master_port "${MAIN_PORT:-29500}" "$@"
