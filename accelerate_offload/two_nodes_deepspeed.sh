#!/usr/bin/env bash
# Run on node 0 only; it starts the others by ssh (pdsh) and needs passwordless logins and the same paths there:
#   bash accelerate_offload/two_nodes_deepspeed.sh train_pretrain.py --data_path ... \
#     --deepspeed accelerate_offload/ds_zero3.json
# Without ssh, on every node: NODE_RANK=0 MAIN_ADDRESS=node1 bash accelerate_offload/two_nodes_deepspeed.sh ...
# HOSTFILE lists the nodes and their GPUs, one "name slots=8" per line.
set -euo pipefail
here=()
[ -n "${NODE_RANK:-}" ] && here=(--no_ssh --node_rank "$NODE_RANK")
exec deepspeed --hostfile "${HOSTFILE:-$(dirname "$0")/hostfile}" "${here[@]}" \
  ${MAIN_ADDRESS:+--master_addr "$MAIN_ADDRESS"} --master_port "${MAIN_PORT:-29500}" "$@"
