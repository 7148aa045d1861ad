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
_NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # a Kubernetes name
_PLAIN = {  # field -> what may stand in it: all land in places where no quoting helps
    "image": r"[\w.:/@-]+",
    "queue": r"\w[\w.,-]*",
    "account": r"\w[\w.-]*",
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
    sizes = {"grace": (job.grace_s, 1), "tasks-per-node": (job.tasks_per_node, 1)}
    sizes |= {"restarts": (job.restarts, 0), "cpus-per-task": (job.cpus_per_task, 0)}
    for flag, (value, least) in sizes.items():
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    _check_machine(job, target)
    if target == "slurm":
        _check_time(job)
    if target == "jobset" and job.queue and not re.fullmatch(_NAME, job.queue):
        raise UserError(f"--queue {job.queue}: no name of a Kueue queue: change it")
    if job.machine.host_chips and job.machine.host_chips % job.tasks_per_node:
        raise UserError(
            f"--tasks-per-node {job.tasks_per_node}: does not divide the {job.machine.host_chips} "
            "accelerators of a host: change it"
        )
    _check_name(job, target)
    _check_text(job)
    _check_env(job, target)
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
        if value and not re.fullmatch(pattern, value, re.ASCII):
            flag = "--config" if field == "config_file" else f"--{field}"
            form = ": write MINUTES, H:MM:SS or D-HH:MM:SS" if field == "time" else ": change it"
            raise UserError(f"{flag} {value}: holds characters that cannot be here{form}")
    for text in (job.recipe, job.workdir, job.data, job.hostfile, *job.command):
        if not text.isprintable():  # a line break would leave the comment or quotes it stands in
            raise UserError(f"{text!r}: holds control characters: take them out")
    for key, value in job.node_selector:
        prefix, _, last = key.rpartition("/")
        good = re.fullmatch(r"[\w.-]{1,63}", last) and re.fullmatch(r"[a-z0-9.-]*", prefix)
        if not good or not re.fullmatch(r"[\w.-]{0,63}", value):
            raise UserError(f"--node-selector {key}={value}: no Kubernetes label: change it")


def _check_machine(job: Job, target: str) -> None:
    """A machine that the target can name."""
    machine = job.machine
    if target == "sky" and machine.kind == "gpu":
        raise UserError(f"{machine}: SkyPilot must know which GPU: write h100:... or h200:...")
    if target in ("tpu-vm", "sky") and machine.platform == "tpu":
        usual = machine.tpu.shapes.get(machine.hosts * machine.host_chips)
        if machine.shape != usual:
            raise UserError(
                f"{machine}: {target} asks for a number of chips and would get {usual or 'another'}"
                " shape: use that, or jobset or xpk"
            )


def _check_time(job: Job) -> None:
    """Slurm sends the signal ``grace_s`` before the limit: there must be something before it."""
    if job.grace_s > 65535:
        raise UserError(f"--grace {job.grace_s}: Slurm takes at most 65535 seconds")
    if job.time and re.fullmatch(_PLAIN["time"], job.time) and seconds_of(job.time) <= job.grace_s:
        raise UserError(
            f"--time {job.time}: the job would be told to end {job.grace_s} s before its limit, "
            "which is when it starts: raise it, or lower --grace"
        )


def seconds_of(time: str) -> int:
    """A limit as Slurm writes it (M, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS), in seconds."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_env(job: Job, target: str) -> None:
    names = [name for name, _ in job.environment] + list(job.secrets)
    ours = ("M2JAX_COORDINATOR", "M2JAX_NUM_PROCESSES", "M2JAX_PROCESS_ID")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--env {name}: is set twice (PYTHONUNBUFFERED and M2JAX_DATA by us)")
        if name in ours and target in ("jobset", "xpk"):
            raise UserError(f"--env {name}: the job sets it for each process: leave it out")
    for name in (*(key for key, _ in job.env), *job.secrets):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"--env {name}: no name of an environment variable: change it")
    for name, value in job.env:
        if _SECRET.search(name):
            raise UserError(
                f"--env {name}: its value would stand in the job for others to read: use --secret "
                f"{name} where the target has it, else export it before you submit"
            )
        if target == "xpk" and re.search(r'["\\]', value):
            raise UserError(f"--env {name}: xpk breaks quotes and backslashes: take them out")
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
