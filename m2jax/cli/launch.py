# SPDX-License-Identifier: Apache-2.0
"""``m2jax launch``: a complete job for a scheduler, from a config and the machine it names."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Flag -> its place in argparse. The job's field has the same name unless ``dest`` says otherwise.
_FLAGS: dict[str, dict[str, Any]] = {
    "--workdir": {"help": "where the run goes, on storage that all hosts see"},
    "--data": {"help": "folder of built data sets (M2JAX_DATA)"},
    "--name": {"help": "of the job (default: made of the config's)"},
    "--topology": {
        "metavar": "NAME",
        "help": "v5p:4x4x8, 2*v6e:16x16 (two slices), h100:32x8 (hosts x GPUs), gpu:2x4, ... "
        "(default: the machine that the config's argument names, else CPU hosts)",
    },
    "--nodes": {"type": int, "default": 0, "help": "hosts, where no machine is named"},
    "--env": {"action": "append", "metavar": "NAME=VALUE", "help": "set for every process"},
    "--restarts": {"type": int, "default": 3, "help": "after failures; preemptions do not count"},
    "--grace": {
        "type": int,
        "default": 300,
        "dest": "grace_s",
        "metavar": "SECONDS",
        "help": "between the signal and the end: at least a step and a save",
    },
    "--tasks-per-node": {
        "type": int,
        "default": 0,
        "help": "processes of a node (default: one per GPU, one on CPU nodes)",
    },
    "--program": {
        "default": "m2jax",
        "help": "how the nodes call m2jax: a path, or words like 'uv run m2jax'",
    },
    "--account": {},
    "--time": {"metavar": "D-HH:MM:SS", "help": "limit of one attempt"},
    "--cpus-per-task": {"type": int, "default": 0},
    "--hostfile": {"help": "mpirun's list of hosts"},
    "--image": {"required": True, "help": "container with m2jax in it (launch/docker)"},
    "--storage": {"help": "what is mounted at /m2jax, for --workdir and --data"},
    "--queue": {"help": "Slurm partition, or Kueue's local queue"},
    "--namespace": {},
    "--secret": {
        "action": "append",
        "dest": "secrets",
        "metavar": "NAME",
        "help": "environment variable whose value is not written into the job",
    },
    "--node-selector": {"action": "append", "metavar": "LABEL=VALUE"},
    "--queue-objects": {
        "action": "store_true",
        "help": "print the Kueue objects that the queue needs, instead of the job",
    },
    "--cluster": {"required": True},
    "--project": {},
    "--zone": {},
    "--spot": {"action": "store_true", "help": "machines that may be taken away, for less"},
}
_COMMON = "workdir data name topology nodes env restarts"
_TARGETS = {  # target -> what it is, flags of its own, which of them it needs
    "slurm": (
        "a batch script for sbatch",
        "grace queue account time tasks-per-node cpus-per-task program",
    ),
    "jobset": (
        "Kubernetes objects: a JobSet, queued by Kueue",
        "grace image storage queue namespace secret node-selector queue-objects",
    ),
    "xpk": ("an xpk command (GKE)", "grace image storage cluster project zone"),
    "tpu-vm": ("a gcloud script for Cloud TPU VMs", "grace image storage project zone spot"),
    "sky": ("a SkyPilot task", "image storage secret spot"),
    "mpi": ("a script for mpirun (Open MPI)", "hostfile tasks-per-node program secret"),
}
_OPTIONAL_IMAGE = ("sky",)
_NEEDED_ZONE = ("tpu-vm",)


def add_parser(subparsers: Any) -> None:
    """Declares the verb and its targets."""
    parser = subparsers.add_parser(
        "launch",
        help="print or submit a job: Slurm, Kubernetes, XPK, TPU VM, SkyPilot, Open MPI",
        description="Prints the job. Which target to choose: launch/README.md.",
        allow_abbrev=False,
    )
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for name, (what, own) in _TARGETS.items():
        target = targets.add_parser(
            name, help=what, description=f"Prints {what}.", allow_abbrev=False
        )
        target.add_argument("--config", required=True, metavar="FILE.py[:ARG]|NAME")
        for flag in (*_COMMON.split(), *own.split()):
            options = dict(_FLAGS[f"--{flag}"])
            if flag == "image" and name in _OPTIONAL_IMAGE:
                options["required"] = False
            if flag == "zone" and name in _NEEDED_ZONE:
                options["required"] = True
            target.add_argument(f"--{flag}", **options)
        target.add_argument("--submit", action="store_true", help="hand it to the scheduler")
        target.add_argument("--debug", action="store_true", help="show the traceback of an error")
        target.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Renders, then prints or submits."""
    from m2jax.launch import render, submit

    job = describe(args)
    if getattr(args, "queue_objects", False):
        text = render.render_queue(job)
    else:
        text = render.render(job, args.target)
    if args.submit:
        return submit.submit(job, args.target, text)
    print(text, end="")
    return 0


def describe(args: argparse.Namespace) -> Any:
    """The job of a command line, after everything has been checked that can be from here.

    Raises:
        UserError: a config that does not load or does not fit the machine; see ``launch.job``.
    """
    from m2jax.config_files import load_config
    from m2jax.launch.job import MOUNT, Job, check
    from m2jax.launch.machine import as_one_host, choose

    _refuse_empty(args)
    experiment = load_config(args.config, args.overrides)
    config, own, argument = _place(args)
    machine = choose(args.topology or "", args.nodes, argument)
    if args.target in ("tpu-vm", "sky"):
        machine = as_one_host(machine)
    tasks = getattr(args, "tasks_per_node", 1) or machine.host_chips or 1
    name = args.name or _name(args.config)
    storage = getattr(args, "storage", None) or ""
    place = MOUNT if storage else "runs"
    # A bucket is written to as one: renames on its mount copy.
    bucket = storage.startswith(("gs://", "s3://")) and not args.workdir
    workdir = args.workdir or f"{storage.rstrip('/') if bucket else place}/{name}"
    words = [*_program(getattr(args, "program", "m2jax")), "train"]
    words += ["--config", config, "--workdir", workdir]
    words += [f"--config.{override}" for override in args.overrides]
    fields = {field: getattr(args, field, None) for field in Job.__dataclass_fields__}
    pairs = {
        "env": _pairs("--env", args.env),
        "node_selector": _pairs("--node-selector", getattr(args, "node_selector", None)),
        "secrets": tuple(getattr(args, "secrets", None) or ()),
    }
    given = {k: v for k, v in fields.items() if v is not None} | pairs
    derived = {
        "name": name,
        "machine": machine,
        "command": tuple(words),
        "workdir": workdir,
        "tasks_per_node": tasks,
        "config_file": own,
        "recipe": recipe(args),
    }
    job = Job(**(given | derived))
    check(job, args.target)
    fit(experiment, job)
    return job


def _refuse_empty(args: argparse.Namespace) -> None:
    """An unset shell variable leaves an empty word, which no flag means."""
    from m2jax.config import UserError

    for flag, options in _FLAGS.items():
        if getattr(args, options.get("dest", flag[2:].replace("-", "_")), None) == "":
            raise UserError(f"{flag}: is empty: is a shell variable not set? Give a value")


def _program(text: str) -> list[str]:
    from m2jax.config import UserError

    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--program {text}: {error}: mend the quotes") from None


def fit(experiment: Any, job: Any) -> None:
    """Refuses a config that the machine's processes would refuse when they start.

    Raises:
        UserError: the mesh, or the batch, does not divide over them.
    """
    from m2jax.config import UserError
    from m2jax.dist.mesh import mesh_shape

    machine, processes = job.machine, job.processes
    devices = machine.all_hosts * machine.host_chips
    if machine.platform == "cpu":
        devices = processes * max(1, experiment.mesh.cpu_devices)
    replica, data, fsdp, _ = mesh_shape(experiment.mesh, devices)
    if replica % machine.slices:
        raise UserError(
            f"mesh.replica={replica}: {job.machine} has {machine.slices} slices, and only this "
            f"axis may cross between them: add --config.mesh.replica={machine.slices}"
        )
    shards, batch = replica * data * fsdp, experiment.data.batch_size
    parts = shards * experiment.train.accumulate
    for count, what in (
        (shards, "shards of mesh.replica x data x fsdp"),
        (parts, f"{shards} shards of {experiment.train.accumulate} micro-batches"),
        (processes, "processes"),
    ):
        if batch % count:
            raise UserError(
                f"data.batch_size={batch}: does not divide over {count} {what}: change one"
            )
    if shards % processes:
        raise UserError(
            f"mesh.replica x data x fsdp = {shards}: no multiple of the {processes} processes, "
            "each of which reads its own rows: change the mesh or --tasks-per-node"
        )


def recipe(args: argparse.Namespace) -> str:
    """The command line that this job came from, without ``--submit``."""
    words = ["m2jax", "launch", args.target, "--config", args.config]
    flags = (*_COMMON.split(), *_TARGETS[args.target][1].split())
    for flag in flags:
        options = _FLAGS[f"--{flag}"]
        value = getattr(args, options.get("dest", flag.replace("-", "_")))
        if value == options.get("default") or value is False:
            continue
        if value is True:
            words.append(f"--{flag}")
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{flag}", str(each)]
    words += [f"--config.{override}" for override in args.overrides]
    return shlex.join(words)


def _place(args: argparse.Namespace) -> tuple[str, str, str]:
    """The config as the job names it, its path where it must be brought along, its argument."""
    from m2jax.config import UserError
    from m2jax.config_files import find_config
    from m2jax.launch.render import CONFIGS

    path, colon, argument = args.config.partition(":")
    file = find_config(path)
    if args.target in ("slurm", "mpi") or _ships(file):
        return args.config, "", argument
    if args.target not in CONFIGS:
        raise UserError(
            f"--config {path}: does not ship with m2jax, so the image has none: build it in and "
            f"name its path there, or use {' or '.join(CONFIGS)}"
        )
    return f"{CONFIGS[args.target]}/{file.name}{colon}{argument}", str(file), argument


def _ships(file: Path) -> bool:
    """Whether an installed m2jax knows this config by its name."""
    from m2jax.config import UserError
    from m2jax.config_files import find_config

    try:
        return find_config(file.stem).resolve() == file.resolve()
    except UserError:
        return False


def _name(config: str) -> str:
    """``configs/pretrain_10b.py:v5p-128`` becomes ``pretrain-10b-v5p-128``."""
    path, _, argument = config.partition(":")
    text = f"{Path(path).stem}-{argument}" if argument else Path(path).stem
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _pairs(flag: str, words: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    from m2jax.config import UserError

    pairs = []
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{flag} {word}: has no value: write NAME=VALUE")
        pairs.append((key, value))
    return tuple(pairs)
