# SPDX-License-Identifier: Apache-2.0
"""An upgrade drill: a database of old vectors is filled with new ones while it is searched.

    python benchmarks/upgrade.py --out runs/upgrade [--items 200000] [--dim 64] [--queries 200]
                                 [--writes 200] [--rest 1] [--index FLAT]

A Milvus server runs in a process of its own, searches in this one, and `m2jax retrieval index` in a
third that is killed (SIGKILL) at a quarter and at half of its way; at three quarters the server is
killed too and started again. Every phase is searched with the new model's queries; at the end ids,
versions and vectors of the whole collection are compared with what was written, by count and by a
checksum. Vectors are synthetic: items are random points, the old model sees them with more noise
than the new one, a query is another look of the new model at an item. Recall@k: the item is among
the first k; beside it what NumPy finds when it compares a query with every vector of that moment.
What is printed is in results.json too.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from m2jax.config import UserError
from m2jax.tasks.retrieval.backfill import Features, backfill, contents, expected
from m2jax.tasks.retrieval.store import Store
from m2jax.tasks.vectors import unit

NOISE = {"old": 1.1, "new": 0.7}  # of a look at an item, whose own coordinates have unit variance
TOP = 10
TIMED = 3  # queries of a phase that are timed, one by one


def looks(rng, items, model, ids):
    """A model's vectors of items."""
    seen = items + NOISE[model] * rng.normal(size=items.shape)
    return Features(ids, seen.astype(np.float32))


class Server:
    """A Milvus in a process of its own."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        """Returns when it answers."""
        words = [Path(sys.executable).parent / "milvus-lite", "server", "--data-dir", self.folder]
        self.process = subprocess.Popen(
            [*map(str, words), "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise SystemExit("upgrade: the server does not start")

    def kill(self):
        """As a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Searches:
    """What searches found and how long they took, phase by phase.

    Args:
        uri: of the database.
        queries: names of the items that are wanted, and vectors.
        old: vectors of all items.
        new: the same by the new model, which take the places of the old ones in their order.
    """

    def __init__(self, uri, queries, old, new):
        self.queries, self.old, self.new = queries, old, new
        self.store = Store(uri)
        self.seconds = []

    def exact(self, replaced):
        """The nearest items of each query when so many are new, by NumPy."""
        held = np.concatenate([self.new.vectors[:replaced], self.old.vectors[replaced:]])
        nearest = np.argsort(-unit(self.queries.vectors) @ unit(held).T, axis=1)[:, :TOP]
        return [[self.new.ids[row] for row in rows] for rows in nearest]

    def one(self, at):
        """One query's answer, timed."""
        start = time.perf_counter()
        answer = self.store.search(self.queries.vectors[at : at + 1], TOP)[0]
        self.seconds.append(time.perf_counter() - start)
        return answer

    def phase(self, name):
        """All queries at once for recall, the first ones alone for their time."""
        self.seconds, versions = [], []
        for at in range(min(TIMED, len(self.queries.ids))):
            self.one(at)
        new = self.store.count("new")
        exact = self.exact(new)
        answers = self.store.search(self.queries.vectors, TOP)
        found = [[hit.id for hit in answer] for answer in answers]
        for answer in answers:
            versions += [hit.version for hit in answer]
        share = {v: versions.count(v) / len(versions) for v in sorted(set(versions))}
        same = [len({*a} & {*b}) / TOP for a, b in zip(found, exact, strict=True)]
        return {
            "phase": name,
            "new": new,
            **{f"recall@{k}": self.recall(found, k) for k in (1, TOP)},
            **{f"exact recall@{k}": self.recall(exact, k) for k in (1, TOP)},
            "of exact answers": float(np.mean(same)),
            "median_ms": 1000 * statistics.median(self.seconds),
            "max_ms": 1000 * max(self.seconds),
            "answers_by_version": share,
        }

    def recall(self, answers, k):
        """Share of the queries whose item is among the first k."""
        pairs = zip(self.queries.ids, answers, strict=True)
        return float(np.mean([name in answer[:k] for name, answer in pairs]))


class Backfill:
    """`m2jax retrieval index` as a user starts it, in so many writes; again when it ends early.

    On a machine too busy for its own time limits the database refuses a write, and the command ends
    with that error. Whoever runs it starts it again; so does this, and counts how often.
    """

    def __init__(self, uri, file, batch, log):
        words = [sys.executable, "-m", "m2jax", "retrieval", "index", "--uri", uri]
        words += ["--features", str(file), "--version", "new", "--batch", str(batch)]
        self.words, self.log, self.restarts = words, log, 0
        self.start()

    def start(self):
        """In a process of its own; what it says goes to the log."""
        with self.log.open("a") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log)

    def running(self):
        """Whether it has not ended; one that ended by an error is started again."""
        if self.process.poll() is None:
            return True
        if self.process.returncode == 0:
            return False
        self.restarts += 1
        if self.restarts > 50:
            raise SystemExit(f"upgrade: the backfill does not go on: see {self.log}")
        self.start()
        return True

    def kill(self):
        """As a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def seen(self):
        """Items it has gone through, by its own words; the count of its last start."""
        said = re.findall(r"\r([\d,]+)/", self.log.read_bytes()[self.begin :].decode())
        return int(said[-1].replace(",", "")) if said else 0


def until(searches, backfill, count, rest):
    """Searches go on until the backfill has seen so many items, or is done.

    Returns:
        What happened meanwhile.
    """
    answered = failed = 0
    searches.seconds = []
    while backfill.running() and backfill.seen() < count:
        try:
            searches.one((answered + failed) % len(searches.queries.ids))
            answered += 1
        except UserError as error:
            failed += 1
            print(f"search: {error}", flush=True)
        wake = time.monotonic() + rest
        while time.monotonic() < wake and backfill.running() and backfill.seen() < count:
            time.sleep(0.05)
    return {
        "seen": backfill.seen(),
        "searches_answered": answered,
        "searches_failed": failed,
        "median_ms": 1000 * statistics.median(searches.seconds or [0]),
        "slowest_ms": 1000 * max(searches.seconds, default=0),
        "backfill_restarted": backfill.restarts,
        "tries_again": backfill.log.read_text().count(": try "),
    }


def drill(args):
    """All phases."""
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    items = rng.normal(size=(args.items, args.dim))
    ids = [f"item-{i:07d}" for i in range(args.items)]
    old, new = (looks(rng, items, model, ids) for model in ("old", "new"))
    chosen = rng.choice(args.items, args.queries, replace=False)
    queries = looks(rng, items[chosen], "new", [ids[i] for i in chosen])
    file = args.out / "new.npz"
    np.savez(file, features=new.vectors, ids=np.array(ids))
    batch = max(args.items // args.writes, 50)
    server = Server(args.out / f"database-{os.getpid()}.db")
    rows, events = [], []
    try:
        with Store(server.uri) as store:
            store.create(args.dim, index=args.index)
            start = time.perf_counter()
            backfill(store, old, "old")
            events.append({"event": "old model indexed", "seconds": time.perf_counter() - start})
        searches = Searches(server.uri, queries, old, new)
        rows.append(searches.phase("before: all old"))
        print(json.dumps(rows[-1]), flush=True)
        log = args.out / "backfill.log"
        for share, what in ((0.25, "backfill"), (0.5, "backfill"), (0.75, "server")):
            filling = Backfill(server.uri, file, batch, log)
            told = until(searches, filling, share * args.items, args.rest)
            filling.kill()
            if what == "server":
                server.kill()
                server.start()
                searches = Searches(server.uri, queries, old, new)
            held = {"new": searches.store.count("new"), "all": searches.store.count()}
            events.append({"event": f"{what} killed", **told, "items_after": held})
            print(json.dumps(events[-1]), flush=True)
            rows.append(searches.phase(f"{held['new'] / args.items:.0%} new"))
            print(json.dumps(rows[-1]), flush=True)
        filling = Backfill(server.uri, file, batch, log)
        told = until(searches, filling, args.items + 1, args.rest)
        events.append({"event": f"backfill ended with {filling.process.wait()}", **told})
        print(json.dumps(events[-1]), flush=True)
        rows.append(searches.phase("after: all new"))
        print(json.dumps(rows[-1]), flush=True)
        held, wanted = contents(searches.store), expected([(new, "new")])
        final = {
            "items": held.items,
            "versions": held.versions,
            "repeated": held.repeated,
            "checksum": held.checksum,
            "checksum_expected": wanted.checksum,
            "as_written": held == wanted,
        }
    finally:
        server.kill()
    made = {"items": args.items, "dim": args.dim, "index": args.index}
    return {**made, "events": events, "rows": rows, "final": final}


def main():
    """Prints every phase as it ends, and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--writes", type=int, default=200, help="of a whole backfill")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds between two searches")
    parser.add_argument("--index", default="FLAT", help="FLAT (exact, default) or HNSW")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = drill(args)
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["final"]))
    raise SystemExit(0 if found["final"]["as_written"] else 1)


if __name__ == "__main__":
    main()
