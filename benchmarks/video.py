# SPDX-License-Identifier: Apache-2.0
"""Video copies: the classical aligners against loops over cells; search among many frames.

    PYTHONPATH=. python benchmarks/video.py align [--sizes 160 400 1200] [--stack 32]
    PYTHONPATH=. python benchmarks/video.py search [--rows 1000000] [--dim 256] [--ann hnsw]

``align``: maps are noise with three copied diagonals, from a fixed seed, settings those of VCSL's
benchmark of 2023-03. Processor time of the process, which other processes do not lengthen much; the
least of three rounds (of one where a round takes longer than ten seconds). The loops are those of
tests/tasks/video/straightforward.py, whose segments are compared too.

``search``: features of videos of 300 frames each, every frame a step of a random walk on the sphere
from the one before; queries are stored frames with noise. Through m2jax's own index, so with
pymilvus and milvus-lite in between; exact neighbours are NumPy's.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from m2jax.tasks.video import align, vectors
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


def walk(rng, rows, dim):
    """Unit features of a video's frames."""
    steps = rng.normal(size=(rows, dim)).astype(np.float32) * (0.25 / np.sqrt(dim))
    steps[0] = rng.normal(size=dim)
    steps[0] /= np.linalg.norm(steps[0])
    path = np.cumsum(steps, axis=0)
    return path / np.linalg.norm(path, axis=1, keepdims=True)


def compare_search(args):
    """One row: time to store, bytes, recall and time of a search."""
    rng = np.random.default_rng(0)
    stored = np.concatenate([walk(rng, FRAMES, args.dim) for _ in range(-(-args.rows // FRAMES))])[
        : args.rows
    ]
    queries = stored[rng.integers(0, args.rows, QUERIES)]
    queries = queries + rng.normal(size=queries.shape).astype(np.float32) * (
        0.5 / np.sqrt(args.dim)
    )
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = np.argsort(-(queries @ stored.T), axis=1)[:, :LIMIT]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        index = vectors.Vectors(f"{name}/frames.db")
        index.create(args.dim, args.ann)
        begin = time.perf_counter()
        for video, first in enumerate(range(0, args.rows, FRAMES)):
            index.insert(video, stored[first : first + FRAMES])
        index.flush()
        index.search(queries[:1], LIMIT, args.ann)  # whatever is built late
        took = time.perf_counter() - begin
        size = sum(f.stat().st_size for f in Path(name).rglob("*") if f.is_file())
        begin = time.perf_counter()
        found = index.search(queries, LIMIT, args.ann)
        each = 1000 * (time.perf_counter() - begin) / QUERIES
        begin = time.perf_counter()
        for query in queries[:20]:
            index.search(query[None], LIMIT, args.ann)
        single = 1000 * (time.perf_counter() - begin) / 20
        index.close()
    numbers = found.video * FRAMES + found.frame
    recall = np.mean([len(set(a) & set(b)) / LIMIT for a, b in zip(numbers, exact, strict=True)])
    print(
        f"{args.ann}, {args.rows:,} x {args.dim}: stored in {took:.0f} s, "
        f"{size / args.rows * 3600 / 1e6:.1f} MB per hour at one frame per second, "
        f"recall@{LIMIT} {recall:.3f}, {each:.1f} ms per frame in batches, {single:.1f} ms alone"
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
    search.add_argument("--ann", choices=sorted(vectors.KINDS), default="hnsw")
    search.add_argument("--folder", type=Path, help="for the index (default: a temporary one)")
    search.set_defaults(run=compare_search)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
