# m2jax for Cloud TPU hosts (JobSet, xpk, TPU VM, SkyPilot).
#   docker build -f launch/docker/tpu.Dockerfile -t REGISTRY/m2jax:tpu .
FROM python:3.12-slim

WORKDIR /opt/m2jax
COPY requirements/base.txt requirements/base.txt
RUN pip install --no-cache-dir --require-hashes -r requirements/base.txt

COPY pyproject.toml setup.py README.md LICENSE ./
COPY m2jax m2jax
COPY configs configs
# libtpu must be the one that the pinned jax was made with: the extra takes care of it.
RUN pip install --no-cache-dir '.[tpu,gcs,s3,wandb]' && python -m m2jax --version

WORKDIR /work
CMD ["m2jax", "doctor"]
