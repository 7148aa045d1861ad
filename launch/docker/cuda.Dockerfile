# m2jax for NVIDIA GPUs (JobSet, xpk, SkyPilot). CUDA and NCCL come with jax's wheels; the host
# brings the driver (580 or newer for CUDA 13), through the NVIDIA container toolkit.
#   docker build -f launch/docker/cuda.Dockerfile -t REGISTRY/m2jax:cuda .
FROM python:3.12-slim

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/m2jax
COPY requirements/base.txt requirements/base.txt
RUN pip install --no-cache-dir --require-hashes -r requirements/base.txt

COPY pyproject.toml setup.py README.md LICENSE ./
COPY m2jax m2jax
COPY configs configs
RUN pip install --no-cache-dir '.[cuda13,gcs,s3,wandb]' && python -m m2jax --version

WORKDIR /work
CMD ["m2jax", "doctor"]
