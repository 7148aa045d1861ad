#!/bin/bash
# m2jax launch tpu-vm --config configs/pretrain_0p4b.py:v6e-256 --workdir gs://my-bucket/runs/0p4b --data /m2jax/data --image registry.example/m2jax:tpu --storage nfs:10.0.0.2:/m2jax --zone us-east5-b --spot
# v6e:16x16: 64 hosts. bash FILE create | start | logs | stop | delete
set -euo pipefail

name=pretrain-0p4b-v6e-256
place=(--zone=us-east5-b)

create() { # waits in the queue until the slice is there
  gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e --spot
  local state=
  until [ "$state" = ACTIVE ]; do
    sleep 30
    state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)')
    case $state in FAILED | SUSPEND*)
      echo "the request for $name is $state: gcloud compute tpus queued-resources describe $name" >&2
      exit 1
      ;;
    esac
  done
}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

start() {
  everywhere "$(cat <<'HOST'
set -eu
if ! mountpoint -q /m2jax; then
  sudo apt-get install -y -q nfs-common
  sudo mkdir -p /m2jax
  sudo mount -t nfs 10.0.0.2:/m2jax /m2jax
fi
sudo docker rm -f m2jax 2>/dev/null || true
sudo docker run -d --name m2jax --privileged --net=host --stop-timeout 300 \
  --restart on-failure:3 \
  -v /m2jax:/m2jax \
  -e PYTHONUNBUFFERED=1 \
  -e M2JAX_DATA=/m2jax/data \
  registry.example/m2jax:tpu \
  m2jax train \
    --config configs/pretrain_0p4b.py:v6e-256 \
    --workdir gs://my-bucket/runs/0p4b
HOST
  )"
}

logs() { gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=0 --command='sudo docker logs -f m2jax'; }

stop() { everywhere 'sudo docker stop --time 300 m2jax'; } # saves first

delete() { gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

case ${1:-} in
  create | start | logs | stop | delete) "$1" ;;
  *)
    echo "usage: bash $0 create | start | logs | stop | delete" >&2
    exit 2
    ;;
esac
