# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the metrics of retrieval over a gallery of a million items.

    python benchmarks/ranking.py [--items 10000 1000000] [--queries 256] [--dim 256]

Each query has ten right items; mAP is by ``tasks.ranking``, which makes scores tile by tile on the
device, beside NumPy, which holds and sorts a query's scores, in blocks of 16 queries. Two sums of
float32 products may part items that all but tie, so a query may differ by one place of one item:
1e-4; the mean must agree to 1e-6. Peak memory is this process's (Linux), less what it held before.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np

from m2jax.tasks.ranking import FeatureScores, hits

RIGHT = 10
BLOCK = 16
HEADER = "| items | form | s | s of a processor | ms per query | memory above the data MiB |"


def problem(items, queries, dim):
    """Unit rows of items and of queries, and each query's right items, which lie near it."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((items, dim), np.float32)
    asked = rng.standard_normal((queries, dim), np.float32)
    right = [np.sort(rng.choice(items, RIGHT, replace=False)) for _ in range(queries)]
    for query, rows in enumerate(right):
        gallery[rows] += 0.3 * asked[query]
    for x in (gallery, asked):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return gallery, asked, right


def average_precision(ranks):
    """Of one query, from the ranks of its right items."""
    return float(np.mean((np.arange(len(ranks)) + 1) / (np.sort(ranks) + 1)))


def tiles(gallery, asked, right):
    """By ``tasks.ranking``."""
    found = hits(FeatureScores(asked, gallery), right)
    return [average_precision(ranks) for ranks in found.ranks]


def sorted_by_numpy(gallery, asked, right):
    """All scores of some queries at a time, sorted."""
    made = []
    for first in range(0, len(asked), BLOCK):
        order = np.argsort(-(asked[first : first + BLOCK] @ gallery.T), axis=1, kind="stable")
        for row, rows in zip(order, right[first : first + BLOCK], strict=True):
            made.append(average_precision(np.flatnonzero(np.isin(row, rows))))
    return made


def memory(name):
    """Resident memory in MiB: now (VmRSS), or the most since ``forget`` (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def forget():
    """Resets the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def main():
    """Prints the table; the form that needs less memory goes first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--dim", type=int, default=256)
    args = parser.parse_args()
    tiles(*problem(1000, 4, args.dim))  # the device's own start
    print(f"{HEADER}\n|{'---|' * 6}")
    for items in args.items:
        data, found = problem(items, args.queries, args.dim), {}
        for form in (tiles, sorted_by_numpy):
            forget()
            held, begin, used = memory("VmRSS"), time.monotonic(), time.process_time()
            found[form] = form(*data)
            took, used = time.monotonic() - begin, time.process_time() - used
            print(
                f"| {items:,} | {form.__name__} | {took:.1f} | {used:.1f} | "
                f"{1000 * used / args.queries:.1f} | {memory('VmHWM') - held:,.0f} |",
                flush=True,
            )
        np.testing.assert_allclose(found[tiles], found[sorted_by_numpy], rtol=0, atol=1e-4)
        means = [np.mean(found[form]) for form in (tiles, sorted_by_numpy)]
        np.testing.assert_allclose(*means, rtol=0, atol=1e-6)
    print(f"mAP {100 * np.mean(found[tiles]):.2f} %, equal in both forms")


if __name__ == "__main__":
    main()
