# SPDX-License-Identifier: Apache-2.0
"""What the choice of keyframes can bring at all, before anything is trained.

    python benchmarks/video_keyframes.py --out runs/video [--cache DIR] [--seeds 0 1 2]

On the training queries of benchmarks/video_segments.py, so that nothing is chosen on its tests.
Of each window one frame is kept: the middle, a random one, or the one most similar to all of its
window (what the extractor's own loss teaches, known exactly); or the middles of windows, without
those that are like the one kept before. "Ceiling" is F of the true segments, moved to the nearest
places where a keyframe's time begins or ends; TN has its best settings for each row.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import numpy as np
import video_segments

from m2jax.tasks.video import align, keyframes, maps, protocol

TN = {"tn_top_k": (3,), "min_sim": (0.3, 0.5, 0.7), "min_length": (1,)}


def middle(window):
    """The middle of each window."""
    return lambda features: keyframes.uniform(len(features), window)


def chance(window):
    """Any frame of each window."""
    rng = np.random.default_rng(0)

    def choose(features):
        first = np.arange(0, len(features), window)
        return first + rng.integers(0, np.minimum(window, len(features) - first))

    return choose


def likest(window):
    """The frame of each window that is most similar to all of it."""

    def choose(features):
        parts = [features[first : first + window] for first in range(0, len(features), window)]
        return np.array([n * window + (x @ x.sum(axis=0)).argmax() for n, x in enumerate(parts)])

    return choose


def thinned(window, most):
    """Middles, without those that are like the one kept before."""

    def choose(features):
        return keyframes.unlike(features, keyframes.uniform(len(features), window), most)

    return choose


ROWS = {
    "all frames": middle(1),
    **{
        f"{name}, 1 of {window}": made(window)
        for window in (2, 4)
        for name, made in (("middle", middle), ("random", chance), ("most alike", likest))
    },
    "1 of 2, unlike by 0.996": thinned(2, 0.996),
    "1 of 2, unlike by 0.965": thinned(2, 0.965),
    "1 of 1, unlike by 0.905": thinned(1, 0.905),
}


def nearest(boxes, query, reference):
    """True segments between the nearest edges; those that vanish are lost."""
    found = []
    for q0, r0, q1, r1 in boxes:
        q = [query[np.abs(query - time).argmin()] for time in (q0, q1)]
        r = [reference[np.abs(reference - time).argmin()] for time in (r0, r1)]
        if q[1] > q[0] and r[1] > r[0]:
            found.append([round(float(x)) for x in (q[0], r[0], q[1], r[1])])
    return found


def row(corpus, choose):
    """Share of frames kept, the ceiling, and the best F of TN, in per cent."""
    kept = {name: choose(own) for name, own in corpus.features.items()}
    edges = {name: keyframes.edges(own, len(corpus.features[name])) for name, own in kept.items()}
    keys = ["-".join(pair) for pair in corpus.pairs]
    labels = {key: own for key, own in zip(keys, corpus.boxes, strict=True) if len(own)}

    def f1(boxes):
        return (
            100 * protocol.evaluate(labels, dict(zip(keys, boxes, strict=True)), pairs=keys)["f1"]
        )

    ceiling = f1(
        [
            nearest(own, edges[q], edges[r])
            for (q, r), own in zip(corpus.pairs, corpus.boxes, strict=True)
        ]
    )
    similarities = [
        maps.cosine(corpus.features[q][kept[q]], corpus.features[r][kept[r]])
        for q, r in corpus.pairs
    ]
    tried = []
    for values in itertools.product(*TN.values()):
        method = video_segments.classical("TN", dict(zip(TN, values, strict=True)))
        spans = align.spans(method, similarities)
        timed = [
            keyframes.in_time(own, edges[q], edges[r])
            for own, (q, r) in zip(spans, corpus.pairs, strict=True)
        ]
        tried.append(f1([align.whole(own, end_exclusive=True).tolist() for own in timed]))
    share = sum(map(len, kept.values())) / sum(map(len, corpus.features.values()))
    return 100 * share, ceiling, max(tried)


def main():
    """The table, mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/clips"), help="of the packages")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    bench = video_segments.Bench(args.out, args.cache.absolute(), 0)
    corpora = [bench.data(seed)["train"] for seed in args.seeds]
    print("| keyframes | kept | ceiling | TN |\n|---|---|---|---|")
    for name, choose in ROWS.items():
        columns = zip(*(row(corpus, choose) for corpus in corpora), strict=True)
        cells = [f"{statistics.fmean(x):.1f} ± {statistics.stdev(x):.1f}" for x in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
