#!/bin/bash
# m2jax launch xpk --config configs/pretrain_1b.py:h100-256 --workdir gs://my-bucket/runs/1b --restarts 100 --image registry.example/m2jax:cuda --cluster research --zone us-central1-a
# h100:32x8, processes: 32. Run with: bash FILE, where xpk is installed.
# xpk counts a preemption (exit code 42) as a restart: give it many.
xpk workload create \
  --cluster=research \
  --zone=us-central1-a \
  --workload=pretrain-1b-h100-256 \
  --device-type=h100-80gb-8 \
  --num-nodes=32 \
  --docker-image=registry.example/m2jax:cuda \
  --max-restarts=100 \
  --restart-on-exit-codes=1,43 \
  --termination-grace-period-seconds=300 \
  --env=PYTHONUNBUFFERED=1 \
  --command='exec env M2JAX_COORDINATOR=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT M2JAX_NUM_PROCESSES=$NNODES M2JAX_PROCESS_ID=$NODE_RANK m2jax train --config configs/pretrain_1b.py:h100-256 --workdir gs://my-bucket/runs/1b'
