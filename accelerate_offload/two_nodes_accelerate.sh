#!/usr/bin/env bash
# Run on every node, with its own NODE_RANK:
#   NODE_RANK=0 MAIN_ADDRESS=node1 bash accelerate_offload/two_nodes_accelerate.sh train_pretrain.py --data_path ...
# STRATEGY is a YAML file of this directory: ddp (default), fsdp2 or deepspeed.
set -euo pipefail
: "${NODE_RANK:?the number of this node: 0, 1, ...}" "${MAIN_ADDRESS:?name or address of node 0}"
nodes=${NODES:-2}
# A multi-node DeepSpeed run would look for a hostfile and ssh; "standard" starts this node only, like the others.
launcher=()
[ "${STRATEGY:-ddp}" = deepspeed ] && launcher=(--deepspeed_multinode_launcher standard)
# What a signal (SLURM's --signal=TERM@300) stops has this many seconds to finish its step and save, instead of 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec accelerate launch --config_file "$(dirname "$0")/${STRATEGY:-ddp}.yaml" "${launcher[@]}" --num_machines "$nodes" \
  --num_processes $((nodes * ${PROCESSES_PER_NODE:-8})) --machine_rank "$NODE_RANK" \
  --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}" "$@"
