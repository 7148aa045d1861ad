# SPDX-License-Identifier: Apache-2.0
"""The description of a job, whatever it is submitted to, and what is refused before it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from m2jax.config import UserError
from m2jax.launch.machine import Machine

MOUNT = "/m2jax"  # where the job sees its storage, on targets that mount one
LABEL = 63  # characters of a Kubernetes name or label value, and of a TPU VM's name
POD_SUFFIX = 6  # Kubernetes adds a dash and five characters to an indexed job's pods


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run on one machine. What a target has no use for stays at its default."""

    name: str
    machine: Machine
    command: tuple[str, ...]  # what every process runs
    workdir: str  # on storage that all processes see
    tasks_per_node: int = 1  # processes of a host
    data: str = ""  # folder of built data sets, as $M2JAX_DATA
    config_file: str = ""  # a config of the user's own, which no image holds
    image: str = ""
    storage: str = ""  # see ``_STORAGE``
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()  # environment variables whose values are never written
    node_selector: tuple[tuple[str, str], ...] = ()
    restarts: int = 3  # after failures; preemptions do not count
    grace_s: int = 300  # seconds between the signal and the end, for a step and a save
    queue: str = ""  # Slurm partition, Kueue local queue
    account: str = ""
    time: str = ""  # limit of one attempt, as Slurm writes it
    cpus_per_task: int = 0  # 0: not asked for
    hostfile: str = ""
    namespace: str = ""
    cluster: str = ""
    project: str = ""
    zone: str = ""
    spot: bool = False
    recipe: str = ""  # the command line that wrote the job

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.machine.all_hosts * self.tasks_per_node

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """What is set for every process."""
        data = (("M2JAX_DATA", self.data),) if self.data else ()
        return (("PYTHONUNBUFFERED", "1"), *data, *self.env)


# Target -> platforms it takes.
PLATFORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "slurm": ("gpu", "cpu"),
        "jobset": ("tpu", "gpu", "cpu"),
        "xpk": ("tpu", "gpu"),
        "tpu-vm": ("tpu",),
        "sky": ("tpu", "gpu", "cpu"),
        "mpi": ("gpu", "cpu"),
    }
)
# Target -> forms of --storage, and their text for messages.
_STORAGE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "jobset": (
            r"claim:[a-z0-9][-a-z0-9.]*|gs://[\w.-]+|nfs:[\w.-]+:/[\w./-]*",
            "claim:NAME (ReadWriteMany), gs://BUCKET or nfs:HOST:/SHARE",
        ),
        "xpk": (r"[a-z]([-a-z0-9]*[a-z0-9])?", "the NAME of an xpk storage"),
        "tpu-vm": (r"nfs:[\w.-]+:/[\w./-]*", "nfs:HOST:/SHARE"),
        "sky": (r"(gs|s3|r2)://[\w.-]+(/[\w./-]*)?", "gs://BUCKET, s3://BUCKET or r2://BUCKET"),
    }
)
_URL = re.compile(r"(gs|s3)://[^/]+/.")  # work directories that need no mount
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY$|API_?KEY|PRIVATE", re.IGNORECASE)
_PLAIN = {  # field -> what may stand in it: all land in places where no quoting helps
    "image": r"[\w.:/@-]+",
    "queue": r"[\w.,-]+",
    "account": r"[\w.-]+",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "namespace": r"[a-z0-9]([-a-z0-9]*[a-z0-9])?",
    "cluster": r"[a-z]([-a-z0-9]*[a-z0-9])?",
    "project": r"[a-z][-a-z0-9:.]*",
    "zone": r"[a-z0-9-]+",
    "config_file": r"[\w./-]+",
}


def check(job: Job, target: str) -> None:
    """Refuses what the target would refuse later, or take and do something else with.

    Raises:
        UserError: names, sizes or places that cannot work there.
    """
    if job.machine.platform not in PLATFORMS[target]:
        raise UserError(
            f"{job.machine}: {target} takes {' or '.join(PLATFORMS[target])} machines: change "
            "--topology, or the target"
        )
    if job.machine.slices > 1 and target in ("tpu-vm", "sky"):
        raise UserError(f"{job.machine}: {target} takes one slice: use jobset or xpk for several")
    if job.grace_s < 1 or job.restarts < 0 or job.tasks_per_node < 1 or job.cpus_per_task < 0:
        raise UserError("--grace and --tasks-per-node must be at least 1, --restarts at least 0")
    if job.machine.host_chips and job.machine.host_chips % job.tasks_per_node:
        raise UserError(
            f"--tasks-per-node {job.tasks_per_node}: does not divide the {job.machine.host_chips} "
            "accelerators of a host: change it"
        )
    _check_name(job, target)
    _check_text(job)
    _check_env(job)
    _check_storage(job, target)


def pod_name(job: Job) -> str:
    """The longest pod name of a JobSet, less the random end."""
    group = "slice" if job.machine.platform == "tpu" else "node"
    return f"{job.name}-{group}-{job.machine.slices - 1}-{job.machine.hosts - 1}"


def _check_name(job: Job, target: str) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.name):
        raise UserError(
            f"--name {job.name}: must be lower-case letters, digits and dashes, and begin with a "
            "letter: change it"
        )
    room = LABEL
    if target == "jobset":
        room -= len(pod_name(job)) - len(job.name) + POD_SUFFIX
    elif target == "xpk":
        # xpk's replicated job is called slice-job; its own limit of 40 comes on top.
        room = min(40, LABEL - len(f"-slice-job-{job.machine.slices}-{job.machine.hosts}") - 6)
    if len(job.name) > room:
        raise UserError(
            f"--name {job.name}: {len(job.name)} characters, but names of {target} that are made "
            f"of it leave room for {room}: shorten it"
        )


def _check_text(job: Job) -> None:
    for field, pattern in _PLAIN.items():
        value = getattr(job, field)
        if value and not re.fullmatch(pattern, value):
            flag = "--config" if field == "config_file" else f"--{field}"
            raise UserError(f"{flag} {value}: holds characters that cannot be here: change it")
    for text in (job.recipe, job.workdir, job.data, job.hostfile, *job.command):
        if not text.isprintable():  # a line break would leave the comment or quotes it stands in
            raise UserError(f"{text!r}: holds control characters: take them out")
    for key, value in job.node_selector:
        prefix, _, last = key.rpartition("/")
        good = re.fullmatch(r"[\w.-]{1,63}", last) and re.fullmatch(r"[a-z0-9.-]*", prefix)
        if not good or not re.fullmatch(r"[\w.-]{0,63}", value):
            raise UserError(f"--node-selector {key}={value}: no Kubernetes label: change it")


def _check_env(job: Job) -> None:
    for name in (*(key for key, _ in job.env), *job.secrets):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"--env {name}: no name of an environment variable: change it")
    for name, value in job.env:
        if _SECRET.search(name):
            raise UserError(
                f"--env {name}: its value would stand in the job for others to read: use --secret "
                f"{name} where the target has it, else export it before you submit"
            )
        if not value.isprintable():
            raise UserError(f"--env {name}: its value holds control characters: change it")


def _check_storage(job: Job, target: str) -> None:
    if target not in _STORAGE:
        return
    pattern, forms = _STORAGE[target]
    if job.storage and not re.fullmatch(pattern, job.storage):
        raise UserError(f"--storage {job.storage}: {target} takes {forms}: change it")
    for flag, place in (("--workdir", job.workdir), ("--data", job.data)):
        if not place or (flag == "--workdir" and _URL.match(place)):
            continue
        if not job.storage:
            raise UserError(
                f"{flag} {place}: a folder of the container, which ends with it: give gs://... or "
                f"s3://... for --workdir, or --storage {forms}"
            )
        if not f"{place}/".startswith(f"{MOUNT}/") or "/../" in f"{place}/":
            raise UserError(
                f"{flag} {place}: lies outside {MOUNT}, where --storage is mounted: write "
                f"{MOUNT}/{job.name}"
            )
