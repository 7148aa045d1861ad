# SPDX-License-Identifier: Apache-2.0
"""One card, everything: ceilings, training, encoding, the loss, PyTorch beside it, kernels.

    PYTHONPATH=. python3 benchmarks/gpu.py --out gpu.json --commit HASH   # under 9 minutes
    PYTHONPATH=. python3 benchmarks/gpu.py --out more.json --rest gpu.json     # what had no time
    PYTHONPATH=. python3 benchmarks/gpu.py --out some.json --only "flags latency hiding" ...
    PYTHONPATH=. python3 benchmarks/gpu.py --out x.json --smoke           # tiny sizes, any machine
    PYTHONPATH=. python3 benchmarks/gpu.py --rows gpu.json more.json      # tables for gpu.md

Runs unattended and without a network. Every part is a child process, so that neither JAX nor
PyTorch holds the other's memory; a part that fails or takes too long is recorded with its error
and costs no other. The JSON is written anew after each part. Parts come by importance
(gpu_parts.py); those that the budget has no room for are recorded as not run. Needs jax, flax,
optax, ml_collections, jaxtyping; aqtp for 8 bits, torch and transformers for the peers, which are
else left out.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_clock import Rows
from gpu_parts import PARTS, Part, distinct, left_by, named

BUDGET_S = 520.0  # of all parts: a lent machine ends a command at 600, and the brief at 540
LEAST_S = 25.0  # a part that is given less is not begun
SMOKE_PATIENCE = 6  # times a part's seconds, for machines that are busy with other things
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "aqtp",
    "nvidia-cudnn-cu13", "nvidia-cublas", "torch", "triton", "transformers", "numpy",
)  # fmt: skip


def card() -> dict:
    """The GPU's name, memory and driver, as it is found; nothing is set."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        name, memory, driver = (x.strip() for x in found.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {"card": f"no GPU ({platform.machine()}, {os.cpu_count()} cores)"}
    return {"card": name, "memory": memory, "driver": driver}


def versions() -> dict:
    """Of what the figures depend on, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(part: Part, smoke: bool, cache: str) -> dict:
    """Of a child: XLA's flags, the share of the card's memory, where tuned kernels are kept."""
    made = dict(os.environ)
    flags = [made.get("XLA_FLAGS", ""), part.flags]
    if smoke:
        made["JAX_PLATFORMS"] = "cpu"
        flags.append("--xla_backend_optimization_level=0")
        made.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait for busy cores
    elif "torch" in part.needs:
        made["JAX_PLATFORMS"] = "cpu"  # it counts FLOPs there and leaves the card alone
    made["XLA_FLAGS"] = " ".join(flag for flag in flags if flag)
    made.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    made.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    made["PYTHONUNBUFFERED"] = "1"
    made["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), made.get("PYTHONPATH")]))
    return made


def run(part: Part, seconds: float, smoke: bool, cache: str) -> dict:
    """One part in a child: its rows, and how it ended."""
    record = {"name": part.name, "flags": part.flags, "status": "ok"}
    for name in part.needs:
        if importlib.util.find_spec(name) is None:
            why = f"{name} is not installed"
            return {**record, "status": "skipped", "error": why, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        words = [sys.executable, str(Path(__file__).resolve()), "--child", part.name]
        words += ["--out", str(out), "--seconds", str(seconds - 3), *(["--smoke"] * smoke)]
        begin = time.monotonic()
        with log.open("wb") as file:
            child = subprocess.Popen(
                words, stdout=file, stderr=file, env=environment(part, smoke, cache),
                start_new_session=True,
            )  # fmt: skip
            try:
                code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(child)
        record["seconds"] = round(time.monotonic() - begin, 1)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code is None:
            record |= {"status": "timeout", "error": f"ended after {seconds:.0f} s"}
        elif code:
            last = lines[-1] if lines else f"exit code {code}"
            record |= {"status": "failed", "error": last[:300], "log": lines[-30:]}
        rows = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        return {**record, "rows": [row for row in map(whole, rows) if row]}


def end(child: subprocess.Popen) -> None:
    """Ends a child and what it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def whole(line: str) -> dict | None:
    """A row; ``None`` for the torn last one of a killed child."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def write(path: Path, found: dict) -> None:
    """Writes the JSON beside its place, then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def child(name: str, out: Path, seconds: float, smoke: bool) -> None:
    """Runs one part here."""
    part = next(part for part in PARTS if part.name == name)
    module, function = part.work.split(":")
    rows = Rows(out, seconds)
    # Nothing here decodes a picture, and a torchvision of another torch stops transformers' import.
    sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]
    work = getattr(importlib.import_module(module), function)
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [p for p in sys.path if p != here]  # its file names must shadow no package's
    work(list(distinct(part) if smoke else part.cases), rows, smoke)


def measure_all(args: argparse.Namespace) -> int:
    """Runs the parts that were asked for; writes and prints as they end."""
    begin, now = time.monotonic(), datetime.datetime.now(datetime.UTC)
    found = {
        "date": now.isoformat(timespec="seconds"),
        "commit": args.commit,
        "smoke": args.smoke,
        **card(),
        "versions": versions(),
        "parts": [],
    }
    earlier = [json.loads(path.read_text(encoding="utf-8")) for path in args.rest]
    chosen = left_by(earlier) if earlier else named(args.only)
    write(args.out, found)
    with tempfile.TemporaryDirectory() as cache:
        for part in chosen:
            left = args.budget - (time.monotonic() - begin)
            if args.smoke and not distinct(part):
                continue
            allowed = part.seconds * (SMOKE_PATIENCE if args.smoke else 1)
            if left < LEAST_S:
                record = {
                    "name": part.name,
                    "status": "not run",
                    "error": "no time left",
                    "rows": [],
                }
            else:
                record = run(part, min(allowed, left), args.smoke, cache)
            found["parts"].append(record)
            found["seconds"] = round(time.monotonic() - begin, 1)
            write(args.out, found)
            good = sum("error" not in row for row in record["rows"])
            print(
                f"{part.name}: {record['status']}, {good} of {len(record['rows'])} rows, "
                f"{record.get('seconds', 0)} s {record.get('error', '')}",
                flush=True,
            )
    return 0


def main() -> int:
    """Measures, or prints the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--commit", default="unknown", help="of the code, for the record")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds, of all parts")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", default=[], metavar="PART")
    which.add_argument(
        "--rest", nargs="+", default=[], type=Path, metavar="JSON",
        help="the parts that these runs had no time for",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--rows", nargs="+", type=Path, metavar="JSON", help="print their tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        from gpu_rows import tables

        print(tables([json.loads(path.read_text(encoding="utf-8")) for path in args.rows]))
        return 0
    if args.out is None:
        parser.error("--out: where the JSON goes")
    if args.child:
        child(args.child, args.out, args.seconds, args.smoke)
        return 0
    return measure_all(args)


if __name__ == "__main__":
    sys.exit(main())
