#!/bin/bash
# m2jax launch mpi --config configs/pretrain_1b.py:h100-256 --workdir /shared/runs/1b --data /shared/data --hostfile hosts --secret WANDB_API_KEY
# h100:32x8, processes: 256. Run with: bash FILE
# SIGTERM to this script lets the run save and ends it with exit code 42; start it again to go on.

export PYTHONUNBUFFERED=1
export M2JAX_DATA=/shared/data
run=(
  mpirun -n 256 --map-by ppr:8:node
  --bind-to none # else each process has one core for everything
  --hostfile hosts
  -x PYTHONUNBUFFERED
  -x M2JAX_DATA
  -x WANDB_API_KEY
  m2jax train \
    --config configs/pretrain_1b.py:h100-256 \
    --workdir /shared/runs/1b
)

told=
failures=0
while true; do
  "${run[@]}" &
  mpirun=$!
  # mpirun kills its processes a second after a SIGTERM; SIGUSR1 it passes on.
  trap 'told=yes; kill -USR1 $mpirun' TERM
  wait $mpirun
  code=$?
  while kill -0 $mpirun 2>/dev/null; do # the trap interrupted the wait
    wait $mpirun
    code=$?
  done
  if [ "$told" ]; then exit $code; fi
  case $code in 0 | 2 | 42) exit $code ;; esac
  failures=$((failures + 1))
  if [ $failures -gt 3 ]; then exit $code; fi
  echo "$(date +%FT%T) exit code $code, failure $failures: again" >&2
done
