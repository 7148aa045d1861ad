# SPDX-License-Identifier: Apache-2.0
"""Video copies: milliseconds of the classical aligners per map, against loops over cells.

    PYTHONPATH=. python benchmarks/video.py align [--sizes 160 400 1200] [--stack 32]

Maps are noise with three copied diagonals, from a fixed seed; settings are those of VCSL's
benchmark of 2023-03. Processor time of the process, which other processes do not lengthen much; the
least of three rounds (of one where a round takes longer than ten seconds). The loops are those of
tests/tasks/video/straightforward.py, whose segments are compared too.
"""

import argparse
import dataclasses
import time

import numpy as np

from m2jax.tasks.video import align
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


def main():
    """Runs the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    aligners = parts.add_parser("align")
    aligners.add_argument("--sizes", type=int, nargs="+", default=[160, 400, 1200])
    aligners.add_argument("--stack", type=int, default=32, help="maps at once, below 1,000")
    aligners.set_defaults(run=compare_aligners)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
