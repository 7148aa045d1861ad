# SPDX-License-Identifier: Apache-2.0
"""A Slurm of several nodes on this machine, for as long as a ``with`` block lasts.

Debian's slurmd may run many times on one host, each as a node of its own (``-N``). Node names must
resolve, because the first of them is where a run's processes meet; the daemons get an /etc/hosts of
their own in a mount namespace, the machine's is not touched. Needs root.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

# No cgroups, no systemd, no accounting; four processors a node whatever the machine has.
CONF = """\
ClusterName=m2jax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
SlurmdParameters=config_overrides
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return (
            f"no {', '.join(absent)} here: "
            "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "a local Slurm needs root"
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "unshare -m is forbidden here"


class Cluster:
    """A running cluster; ``environ`` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def run(self, *words: str) -> str:
        """A Slurm command's output."""
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    def show(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(job))
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def wait(self, job: int, *states: str, seconds: float = 150) -> dict[str, str]:
        """Waits until a job is in one of ``states``."""
        return until(lambda: (s := self.show(job))["JobState"] in states and s, seconds)

    def go(self, job: int) -> None:
        """Starts a requeued job now: Slurm would let it wait two minutes.

        Said until it is heard: an update while the requeue is under way is lost. And not at once:
        slurmd knows a job's credentials by their second, and takes one as old as the end of the
        last attempt for revoked, whereupon Slurm gives the job up.
        """
        self.wait(job, "PENDING")
        time.sleep(3)

        def started() -> bool:
            with contextlib.suppress(RuntimeError):
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return self.show(job)["JobState"] != "PENDING"

        until(started, 60)

    def pids(self, job: int, rank: int) -> list[int]:
        """Processes of one task, found by their environment."""
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = file.read_bytes().split(b"\0")
                if {b"SLURM_JOB_ID=%d" % job, b"SLURM_PROCID=%d" % rank} <= {*words}:
                    found.append(int(file.parent.name))
        return found


def until(probe: Callable[[], T], seconds: float) -> T:
    """Polls until ``probe`` says something true, and returns that."""
    end = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.2)


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """Starts a cluster and ends every process of it."""
    folder = Path(tempfile.mkdtemp(prefix="m2jax-slurm-", dir="/var/tmp"))
    daemons: list[subprocess.Popen] = []
    try:
        folder.chmod(0o755)  # munged runs as a user of its own
        daemons.append(_munge(folder))
        names = [f"m2node{i}" for i in range(nodes)]
        _configure(folder, names)
        made = Cluster(folder)
        daemons.append(_daemon(made, "slurmctld", "-D", "-i"))
        daemons.extend(_daemon(made, "slurmd", "-D", "-N", name) for name in names)
        until(lambda: _idle(made) == nodes, 30)
        yield made
        with contextlib.suppress(RuntimeError):
            made.run("scancel", "--user=root")
            until(lambda: not made.run("squeue", "-h"), 30)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _idle(made: Cluster) -> int:
    try:
        return int(made.run("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)
    except RuntimeError:  # the controller does not answer yet
        return 0


def _munge(folder: Path) -> subprocess.Popen:
    """The service that Slurm's parts trust each other by."""
    home = folder / "munge"
    home.mkdir(mode=0o755)
    (home / "key").write_bytes(os.urandom(1024))
    (home / "key").chmod(0o400)
    for path in (home, home / "key"):
        shutil.chown(path, "munge", "munge")
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    files["seed-file"] = "seed"
    words = [f"--{flag}={home / name}" for flag, name in files.items()]
    program = shutil.which("munged", path=PATH)
    assert program is not None
    words = [program, "--foreground", *words]
    return _start(words, folder / "munged.log", user="munge", group="munge", extra_groups=[])


def _configure(folder: Path, names: list[str]) -> None:
    ports = _free_ports(len(names) + 1)
    conf = CONF.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        controller=ports[-1],
        names=f"m2node[0-{len(names) - 1}]",
        first=ports[0],
        last=ports[-2],
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "state").mkdir()
    hosts = Path("/etc/hosts").read_text()
    (folder / "hosts").write_text(f"{hosts.rstrip()}\n127.0.0.1 {' '.join(names)}\n")


def _free_ports(count: int) -> range:
    """``count`` ports in a row, below those that the system hands out."""
    for first in range(17_000, 30_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return range(first, first + count)
    raise RuntimeError("no free ports")


def _daemon(made: Cluster, *words: str) -> subprocess.Popen:
    hosts = made.folder / "hosts"
    script = f'mount --bind {hosts} /etc/hosts; exec "$@"'
    private = ["unshare", "-m", "--propagation", "private", "bash", "-ec", script, "bash"]
    return _start([*private, *words], made.folder / f"{words[-1]}.log", env=made.environ)


def _start(words: list[str], log: Path, **options: Any) -> subprocess.Popen:
    with log.open("wb") as out:
        return subprocess.Popen(words, stdout=out, stderr=out, **options)
