#!/bin/bash
# m2jax launch xpk --config configs/pretrain_1b.py:v6e-256 --workdir gs://my-bucket/runs/1b --topology '2*v6e:16x16' --restarts 100 --image registry.example/m2jax:tpu --cluster research --project my-project --zone us-east5-b --config.mesh.replica=2
# 2*v6e:16x16, processes: 128. Run with: bash FILE, where xpk is installed.
# xpk counts a preemption (exit code 42) as a restart: give it many.
xpk workload create \
  --cluster=research \
  --project=my-project \
  --zone=us-east5-b \
  --workload=pretrain-1b-v6e-256 \
  --tpu-type=v6e-16x16 \
  --num-slices=2 \
  --docker-image=registry.example/m2jax:tpu \
  --max-restarts=100 \
  --restart-on-exit-codes=1,43 \
  --termination-grace-period-seconds=300 \
  --env=PYTHONUNBUFFERED=1 \
  --command='exec m2jax train --config configs/pretrain_1b.py:v6e-256 --workdir gs://my-bucket/runs/1b --config.mesh.replica=2'
