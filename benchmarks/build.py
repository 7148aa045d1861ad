# SPDX-License-Identifier: Apache-2.0
"""A build of shards whose input is known to the record: faults found, duplicates, speed, memory.

    python benchmarks/build.py [--records 10000 30000 100000] [--again 30000]

Writes the collections of benchmarks/build_inputs.py, runs ``m2jax data build shards`` on them in a
process of its own, and compares what became of each record with what was planted. With
``--again`` a second build of that size is killed at four moments and goes on, and the checksums of
all files are compared.
"""

import argparse
import collections
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import build_inputs

from m2jax.data.build import manifest, work
from m2jax.data.build.records import decode


def run(words, out, *, kill_when=None):
    """One build in a process of its own: seconds, processor seconds, peak memory in bytes.

    ``kill_when`` is asked twenty times a second whether to kill it; the result is then ``None``.
    """
    command = [sys.executable, "-m", "m2jax", "data", "build", "shards", "--out", str(out), *words]
    begin = time.perf_counter()
    log = out.parent / f"{out.name}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    killed = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG if kill_when else 0)
        if pid:
            break
        if not killed and kill_when(out):
            process.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if killed and process.returncode == -signal.SIGKILL:
        return None
    if process.returncode:
        raise SystemExit(log.read_text()[-2000:])
    took = time.perf_counter() - begin
    return took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def outcome(out):
    """What became of each key: a set of reasons; {"kept"} for what is in the shards."""
    found = collections.defaultdict(set)
    for shard in manifest.read(out)["shards"]:
        reader = work.Reader(out / shard["file"])
        for first in range(0, len(reader), 1000):
            rows = list(range(first, min(first + 1000, len(reader))))
            for data in reader.at(rows):
                found[decode(data, shard["file"]).key].add("kept")
    for file in (out / manifest.ASIDE).glob("*.jsonl"):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if not row["reason"].startswith("caption: "):
                    found[row["key"]].add(row["reason"])
    return found


def compare(truth, found):
    """Faults missed, and the duplicates' table."""
    duplicates = ("exact duplicate", "near duplicate")
    bad = [(key, *row) for key, row in truth.items() if row[0].startswith("bad")]
    missed = [(key, label) for key, label, expected in bad if expected not in found[key]]
    kinds = collections.Counter(label for _, label, _ in bad)
    by_label = collections.defaultdict(list)
    for key, (label, _) in truth.items():
        by_label[label].append(found[key])
    gone = {
        label: sum(bool(reasons & set(duplicates)) for reasons in rows)
        for label, rows in by_label.items()
    }
    planted = {label: len(rows) for label, rows in by_label.items()}
    right = gone["exact"] + gone["near"]
    wrong = sum(gone[label] for label in ("plain", "same text", "same image"))
    caught = sum("evaluation image" in reasons for reasons in by_label["evaluation"])
    lost = [
        key
        for key, (label, _) in truth.items()
        if label in ("plain", "same text", "same image") and found[key] != {"kept"}
    ]
    return {
        "kinds of bad rows": len(kinds),
        "bad rows": len(bad),
        "bad rows missed": len(missed),
        "examples": missed[:5],
        "exact recall": gone["exact"] / planted["exact"],
        "near planted": planted["near"],
        "near recall": gone["near"] / planted["near"],
        "duplicate precision": right / max(1, right + wrong),
        "evaluation recall": caught / planted["evaluation"],
        "good records lost": len(lost),
        "good records": planted["plain"] + planted["same text"] + planted["same image"],
        "lost to": dict(collections.Counter(str(sorted(found[key])) for key in lost)),
    }


def checksums(out):
    """SHA-256 of every file."""
    return {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }


def moments(units):
    """Moments to kill a build at: by how many folders a stage has made."""

    def made(stage, count):
        return lambda out: len(list((out / ".work" / stage).glob("[!.]*"))) >= count

    return (made("read", units // 2), made("duplicates", 1), made("list", 2), made("shards", 1))


def main():
    """Prints one JSON object per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--again", type=int, default=0, help="size to kill and build once more")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; 0 was for tuning")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    args = parser.parse_args()
    for count in args.records:
        if args.folder:
            args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            words, truth = build_inputs.write(folder / "in", count, seed=args.seed)
            took, processor, peak = run(words, folder / "out")
            row = {
                "records": count,
                "seconds": round(took, 1),
                "records/s": round(count / took),
                "records/s per core": round(count / processor),
                "peak MB": round(peak / 1e6),
                **compare(truth, outcome(folder / "out")),
            }
            print(json.dumps(row), flush=True)
            if count == args.again:
                files = [f for s in manifest.read(folder / "out")["sources"] for f in s["files"]]
                runs = [run(words, folder / "killed", kill_when=m) for m in moments(len(files))]
                run(words, folder / "killed")
                same = checksums(folder / "out") == checksums(folder / "killed")
                row = {"kills": runs.count(None), "same bytes": same}
                print(json.dumps(row), flush=True)
            shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
