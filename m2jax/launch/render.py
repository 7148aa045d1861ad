# SPDX-License-Identifier: Apache-2.0
"""A job as the text that its target takes."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from m2jax.config import UserError
from m2jax.launch.job import MOUNT, Job, check

TARGETS = ("slurm", "jobset", "xpk", "tpu-vm", "sky", "mpi")
CONFIGS = {"jobset": "/etc/m2jax", "tpu-vm": "/etc/m2jax", "sky": "/tmp/m2jax"}  # of own configs
_XPK_GPUS = {"h100": "h100-80gb-8", "h200": "h200-141gb-8"}


def render(job: Job, target: str) -> str:
    """The whole job file for ``target``, one of ``TARGETS``.

    Raises:
        UserError: the target cannot take the job.
    """
    check(job, target)
    extra: dict[str, Any] = {"job": job, "mount": MOUNT}
    if target == "sky":  # the extras of the stores it writes to
        schemes = {"gs": "gcs", "s3": "s3"}
        extra["stores"] = [v for k, v in schemes.items() if job.workdir.startswith(f"{k}://")]
    if job.machine.platform == "tpu":
        chips = job.machine.hosts * job.machine.host_chips
        extra["accelerator_type"] = job.machine.tpu.accelerator_type(chips)
    if target == "xpk":
        extra |= _xpk(job)
    if target == "tpu-vm":
        extra["host"] = _text("tpu-vm-host", extra).rstrip("\n")
    return _text(target, extra)


def render_queue(job: Job) -> str:
    """The Kueue objects that a JobSet's queue consists of.

    Raises:
        UserError: the job names no queue, or uses no accelerator that a quota could count.
    """
    if not job.queue or not job.machine.host_chips:
        raise UserError("--queue-objects: needs --queue NAME and a machine of TPUs or GPUs")
    tpu = job.machine.platform == "tpu"
    labels = list(job.node_selector)
    if tpu:
        labels.insert(0, ("cloud.google.com/gke-tpu-accelerator", job.machine.tpu.gke))
        labels.insert(1, ("cloud.google.com/gke-tpu-topology", job.machine.shape))
    flavor = f"{job.machine.kind}-{job.machine.shape}" if tpu else job.machine.kind
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    return _text("kueue", {"job": job, "labels": labels, "flavor": flavor, "resource": resource})


def _xpk(job: Job) -> dict[str, str]:
    """For xpk, which runs a line of shell in a subshell and passes signals on to that alone."""
    line = f"exec {shlex.join(job.command)}"
    if job.machine.platform == "tpu":
        return {"command": line}
    if job.machine.kind not in _XPK_GPUS or job.machine.host_chips != 8:
        raise UserError(f"{job.machine}: xpk takes hosts of 8 GPUs of {' or '.join(_XPK_GPUS)}")
    # These are the names of xpk's own variables.
    peers = (
        "M2JAX_COORDINATOR=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT "
        "M2JAX_NUM_PROCESSES=$NNODES M2JAX_PROCESS_ID=$NODE_RANK"
    )
    return {
        "command": f"exec env {peers} {shlex.join(job.command)}",
        "device_type": _XPK_GPUS[job.machine.kind],
    }


def _text(name: str, values: dict[str, Any]) -> str:
    return _templates().get_template(f"{name}.j2").render(values)


@functools.cache
def _templates() -> jinja2.Environment:
    """Undefined names are errors; the filters quote for the language they are named after."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("m2jax.launch"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # shell and YAML, which HTML's rules would spoil
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "word": shlex.quote,
        "command": _command,
        "yaml": functools.partial(json.dumps, ensure_ascii=False),
        "plain": _plain,
        "basename": lambda path: Path(path).name,
        "read": _read,
    }
    return templates


def _plain(text: str) -> str:
    """A YAML string, in quotes only where it would be read as something else."""
    read_otherwise = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", text, re.ASCII) and text.lower() not in read_otherwise:
        return text
    return json.dumps(text, ensure_ascii=False)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}): mend the file") from None


def _command(words: Sequence[str], indent: int = 4) -> str:
    """A command line for a shell, one option to a line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and lines[0]:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return (" \\\n" + " " * indent).join(" ".join(line) for line in lines)
