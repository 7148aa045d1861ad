# SPDX-License-Identifier: Apache-2.0
"""Video copies: the classical aligners against loops over cells; search among many frames.

    PYTHONPATH=. python benchmarks/video.py align [--sizes 160 400 1200] [--stack 32]
    PYTHONPATH=. python benchmarks/video.py search [--rows 1000000] [--dim 256] [--ann scan hnsw]

``align``: maps are noise with three copied diagonals, from a fixed seed, settings those of VCSL's
benchmark of 2023-03. Processor time of the process, which other processes do not lengthen much; the
least of three rounds (of one where a round takes longer than ten seconds). The loops are those of
tests/tasks/video/straightforward.py, whose segments are compared too.

``search``: features of videos of 300 frames each, every frame a step of a random walk on the sphere
from the one before; queries are stored frames with noise. Through m2jax's own index, so with
pymilvus and milvus-lite in between, or by the scan of all features; exact neighbours are NumPy's.
Bytes are those of everything that was written: Milvus' files hold the features once more, beside
those of the library's folder, which are all that a scan needs.
"""

import argparse
import dataclasses
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from m2jax.tasks.video import align, features, library, scan, vectors
from tests.tasks.video import straightforward


def similarity(rng, size):
    """Noise around 0.1 with three diagonals around 0.8, as features of one frame a second give."""
    values = rng.normal(0.1, 0.1, (size, size))
    for _ in range(3):
        q, r = rng.integers(0, size // 2, 2)
        length = int(rng.integers(size // 10, size // 2))
        steps = np.arange(min(length, size - q, size - r))
        values[q + steps, r + steps] = rng.normal(0.8, 0.1, len(steps))
    return np.clip(values, -1, 1).astype(np.float32)


def timed(work):
    """Least processor time in milliseconds, and what the work gave."""
    took = []
    while len(took) < 3 and (not took or took[0] < 10):
        begin = time.process_time()
        found = work()
        took.append(time.process_time() - begin)
    return 1000 * min(took), found


def compare_aligners(args):
    """A row per method and size."""
    print("| map | method | loops | arrays | arrays, stacked | times |\n|---|---|---|---|---|---|")
    for size in args.sizes:
        rng = np.random.default_rng(size)
        several = [similarity(rng, size) for _ in range(args.stack if size < 1000 else 2)]
        for name, method in align.BENCHMARK.items():
            loops, slow = timed(
                lambda name=name, method=method, one=several[0]: straightforward.METHODS[name](
                    one, **dataclasses.asdict(method)
                )
            )
            alone, fast = timed(lambda method=method, one=several[0]: align.align(method, [one])[0])
            stacked, _ = timed(lambda method=method, all=several: align.align(method, all))
            if fast.tolist() != slow:
                raise SystemExit(f"{name} at {size}: {fast.tolist()} is not {slow}")
            each = stacked / len(several)
            row = f"{loops:,.1f} | {alone:,.1f} | {each:,.1f} | {loops / min(alone, each):,.0f}"
            print(f"| {size} x {size} | {name} | {row} |", flush=True)


FRAMES = 300  # of a video
QUERIES = 200
LIMIT = 20
PART = 50_000  # rows that NumPy compares at once


def walk(rng, rows, dim):
    """Unit features of a video's frames."""
    steps = rng.standard_normal((rows, dim), np.float32) * np.float32(0.25 / np.sqrt(dim))
    steps[0] = rng.standard_normal(dim, np.float32)
    steps[0] /= np.linalg.norm(steps[0])
    path = np.cumsum(steps, axis=0)
    return path / np.linalg.norm(path, axis=1, keepdims=True)


def exact(queries, stored):
    """The nearest rows by NumPy, a part of the stored at a time."""
    best = np.zeros((len(queries), 0), np.float32)
    ids = np.zeros((len(queries), 0), np.int64)
    for first in range(0, len(stored), PART):
        here = queries @ stored[first : first + PART].T
        best = np.concatenate([best, here], axis=1)
        numbers = np.broadcast_to(first + np.arange(here.shape[1]), here.shape)
        ids = np.concatenate([ids, numbers], axis=1)
        near = np.argpartition(-best, LIMIT - 1, axis=1)[:, :LIMIT]
        best, ids = (np.take_along_axis(x, near, axis=1) for x in (best, ids))
    return ids


def stored_in(folder, ann, stored):
    """An index of the features, made as ``m2jax video index`` does; says how far it is."""
    starts = range(0, len(stored), FRAMES)
    if ann == "scan":
        files = [folder / "features" / f"{first:08d}.npy" for first in starts]
        for path, first in zip(files, starts, strict=True):
            features.write(path, stored[first : first + FRAMES])
        return scan.Scan(files, [len(stored[first : first + FRAMES]) for first in starts])
    index = vectors.Vectors(str(folder / "frames.db"))
    index.create(stored.shape[1], ann)
    begin = time.perf_counter()
    for video, first in enumerate(starts):
        index.insert(video, stored[first : first + FRAMES])
        if video % 333 == 332:
            print(f"{first + FRAMES:,} in {time.perf_counter() - begin:.0f} s", flush=True)
    index.flush()
    print(f"flushed after {time.perf_counter() - begin:.0f} s", flush=True)
    return index


def clock(work):
    """What it gave, and milliseconds of wall and of processor time."""
    wall, own = time.perf_counter(), time.process_time()
    found = work()
    return found, 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - own)


def compare_search(args):
    """A row per index: time to store, bytes, recall and time of a search."""
    rng = np.random.default_rng(0)
    stored = np.concatenate([walk(rng, FRAMES, args.dim) for _ in range(-(-args.rows // FRAMES))])
    stored = stored[: args.rows]
    noise = rng.standard_normal((QUERIES, args.dim), np.float32) * np.float32(0.5 / args.dim**0.5)
    queries = stored[rng.integers(0, args.rows, QUERIES)] + noise
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    truth, wall, own = clock(lambda: exact(queries, stored))
    print(f"NumPy, exact: {wall / QUERIES:.1f} ms per frame, {own / QUERIES:.1f} of processor time")
    for ann in args.ann:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            begin = time.perf_counter()
            index = stored_in(Path(name), ann, stored)
            index.search(queries[:1], LIMIT, ann)  # whatever is built or read late
            took = time.perf_counter() - begin
            size = sum(f.stat().st_size for f in Path(name).rglob("*") if f.is_file())
            index.search(queries, LIMIT, ann)  # compiles
            found, wall, own = clock(lambda index=index, ann=ann: index.search(queries, LIMIT, ann))
            alone = [
                clock(lambda index=index, ann=ann, q=q: index.search(q[None], LIMIT, ann))[1]
                for q in queries[: args.alone + 1]
            ][1:]
            index.close()
        ids = found.video * FRAMES + found.frame
        recall = np.mean([len(set(a) & set(b)) / LIMIT for a, b in zip(ids, truth, strict=True)])
        print(
            f"{ann}, {args.rows:,} x {args.dim}: stored in {took:.0f} s, "
            f"{size / args.rows * 3600 / 1e6:.1f} MB per hour at one frame per second, "
            f"recall@{LIMIT} {recall:.4f}, {wall / QUERIES:.1f} ms per frame of {QUERIES} "
            f"({own / QUERIES:.1f} of processor time), {np.median(alone):.0f} ms alone; "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory",
            flush=True,
        )


def main():
    """Runs the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    aligners = parts.add_parser("align")
    aligners.add_argument("--sizes", type=int, nargs="+", default=[160, 400, 1200])
    aligners.add_argument("--stack", type=int, default=32, help="maps at once, below 1,000")
    aligners.set_defaults(run=compare_aligners)
    search = parts.add_parser("search")
    search.add_argument("--rows", type=int, default=1_000_000)
    search.add_argument("--dim", type=int, default=256)
    search.add_argument("--ann", nargs="+", choices=library.ANN, default=["scan", "hnsw"])
    search.add_argument("--alone", type=int, default=5, help="searches of one frame")
    search.add_argument("--folder", type=Path, help="for the index (default: a temporary one)")
    search.set_defaults(run=compare_search)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
