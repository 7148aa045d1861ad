# SPDX-License-Identifier: Apache-2.0
"""Copied segments on edited real clips: trained detectors and keyframes against classical methods.

    python benchmarks/video_segments.py --out runs/video [--cache DIR] [--rows HV SPD]
                                        [--seeds 0 1 2] [--steps 400] [--dry-run] [--ends]

Clips and features are those of benchmarks/video_clips.py. A seed draws the queries of training and
of two tests, one of the kinds of edits that training has and one of others, both of videos that
training has not; and it trains. Settings of the classical methods and the detectors' confidence are
those of the best F on a third of the training queries. All segments end where the copy is over.

A row that is done leaves a file named by the code of m2jax/, the row's settings and its seed, and
is not made again. The table of what is there is printed after each row.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import video_clips
from code_tree import tree

from m2jax.tasks.video import align, pattern, protocol, saved, ssan
from m2jax.tasks.video.examples import Corpus

WINDOW = 4
TRAINING, TEST = 60, 24  # queries
TUNED = 160  # pairs of training that settings are chosen on
CONFS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
GRIDS = {
    "HV": {"min_sim": (0.3, 0.5, 0.7), "iou_thresh": (0.3, 0.9)},
    "TN": {"tn_top_k": (3, 5), "min_sim": (0.3, 0.5, 0.7), "min_length": (1, 5)},
    "DP": {"discontinue": (3, 9), "ave_sim": (1.3, 1.5, 1.7), "min_length": (1, 5)},
    "DTW": {"discontinue": (3, 9), "min_sim": (0.3, 0.5), "min_length": (1, 5)},
}
# Method, window, keyframes: "all", "uniform", "ske" (trained alone) or "ssan" (with the detector);
# and what a detector starts from.
ROWS = {
    "HV": ("HV", 1, "all", ""),
    "TN": ("TN", 1, "all", ""),
    "DP": ("DP", 1, "all", ""),
    "DTW": ("DTW", 1, "all", ""),
    "SPD": ("SPD", 1, "all", ""),
    "SSAN": ("SPD", WINDOW, "ssan", ""),
    "SPD, uniform": ("SPD", WINDOW, "uniform", ""),
    "SPD, SKE": ("SPD", WINDOW, "ske", ""),
    "TN, uniform": ("TN", WINDOW, "uniform", ""),
    "TN, SKE": ("TN", WINDOW, "ske", ""),
    "SSAN, from SPD": ("SPD", WINDOW, "ssan", "SPD"),
    "SPD, uniform, from SPD": ("SPD", WINDOW, "uniform", "SPD"),
}
TESTS = {"seen": video_clips.SEEN, "held out": video_clips.HELD_OUT}
COLUMNS = {
    **{f"{test} {name}": f"{name} {test}" for test in TESTS for name in ("f1", "recall")},
    "frames kept": "kept",
    "cells": "cells",
    "ms per pair": "ms",
    "training s": "trained",
}


class Bench:
    """Queries, trainings and scores under one folder."""

    def __init__(self, out, cache, steps):
        self.out, self.cache, self.steps, self.tree = out.absolute(), cache, steps, tree()
        self.out.mkdir(parents=True, exist_ok=True)
        self._clips = None

    def settings(self, kind, window, seed):
        """Of a training."""
        return ssan.Settings(kind=kind, window=window, seed=seed, steps=self.steps)

    def code(self, row, seed):
        """Names what a row depends on."""
        method, window, kept, begun = ROWS[row]
        kind = "ssan" if kept == "ssan" else "spd"
        settings = asdict(self.settings(kind, window, seed)) if method == "SPD" else GRIDS[method]
        own = [row, settings, window, kept, begun, self.steps if kept == "ske" else 0, seed, CONFS]
        own += [
            TRAINING,
            TEST,
            TUNED,
            video_clips.__dict__["PACKAGES"],
            video_clips.RATE,
            self.tree,
        ]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]

    def file(self, row, seed):
        """Of a row's scores."""
        name = row.replace(", ", "-").lower()
        return self.out / f"{name}-{seed}-{self.code(row, seed)}.json"

    def data(self, seed):
        """Queries of training and tests, kept in a file."""
        file = self.out / f"queries-{seed}-{self.tree}.npz"
        if not file.exists():
            if self._clips is None:
                self._clips = video_clips.videos(self.cache)
            features = video_clips.Features(self._clips.train)
            made = {"train": (self._clips.train, video_clips.SEEN, TRAINING, 3 * seed)}
            for number, (test, kinds) in enumerate(TESTS.items(), 1):
                made[test] = (self._clips.test, kinds, TEST, 3 * seed + number)
            arrays = {}
            for name, (clips, kinds, count, own) in made.items():
                corpus = video_clips.corpus(clips, kinds, count, own, features)
                arrays |= {f"{name}/{video}": x for video, x in corpus.features.items()}
                table = {"pairs": corpus.pairs, "boxes": corpus.boxes}
                arrays[f"{name}/table"] = np.array(json.dumps(table))
            temporary = file.with_suffix(f".{os.getpid()}.npz")
            np.savez(temporary, **arrays)
            temporary.replace(file)
        with np.load(file) as loaded:
            arrays = dict(loaded)
        return {name: _corpus(arrays, name) for name in ("train", *TESTS)}

    def part(self, kind, window, seed, train, start=None, name=""):
        """A training; its folder is kept, and read if it is there."""
        settings = self.settings(kind, window, seed)
        text = json.dumps([asdict(settings), name, self.tree], sort_keys=True)
        code = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = self.out / f"part-{name or kind}-{seed}-{code}"
        if not folder.exists():
            begin = time.process_time()
            part = ssan.train(
                train, settings, start=start, say=lambda line: print(line, flush=True)
            )
            part.report["seconds"] = time.process_time() - begin
            saved.write(folder, part)
        return saved.read(folder)

    def chosen(self, row, seed, train):
        """The keyframes of a row, its candidates for a method, and seconds of training."""
        method, window, kept, begun = ROWS[row]
        start, seconds = None, 0.0
        if kept == "ske":
            start = self.part("ske", window, seed, train)
        elif begun:
            start = self.part("spd", 1, seed, train, None, "spd-all")
        if start is not None:
            seconds += start.report["seconds"]
        if method != "SPD":
            own = start or ssan.Part(self.settings("spd", window, seed), 0)
            grid = GRIDS[method]
            tried = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
            return pattern.Keyframes(own), [classical(method, one) for one in tried], seconds
        kind = "ssan" if kept == "ssan" else "spd"
        name = f"{kind}-{kept}-from-{begun.lower()}" if begun else f"{kind}-{kept}"
        part = self.part(kind, window, seed, train, start, name)
        seconds += part.report["seconds"]
        return pattern.Keyframes(part), [pattern.Spd(part, conf=c) for c in CONFS], seconds

    def make(self, row, seed):
        """Trains, tunes and scores a row if it is not there."""
        file = self.file(row, seed)
        if file.exists():
            return
        data = self.data(seed)
        choose, methods, seconds = self.chosen(row, seed, data["train"])
        train = data["train"]
        some = Corpus(train.features, train.pairs[:TUNED], train.boxes[:TUNED])
        tuned = [score(method, choose, some)["f1"] for method in methods]
        best = int(np.nanargmax(tuned))
        found = {"method": _shown(methods[best]), "tuned f1": tuned[best], "training s": seconds}
        for test in TESTS:
            own = score(methods[best], choose, data[test])
            found |= {f"{test} {name}": own[name] for name in ("f1", "precision", "recall")}
            found |= {name: own[name] for name in ("frames kept", "cells", "ms per pair")}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(file)

    def scores(self, row, seed):
        """The figures of a row, or none where it is not there."""
        file = self.file(row, seed)
        return json.loads(file.read_text()) if file.exists() else None


def _corpus(arrays, name):
    table = json.loads(str(arrays[f"{name}/table"]))
    features = {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}/")}
    features.pop("table")
    return Corpus(features, [tuple(pair) for pair in table["pairs"]], table["boxes"])


def classical(name, settings):
    """A classical method: VCSL's settings of 2023-03, but for some."""
    return align.with_settings(name, asdict(align.BENCHMARK[name]) | settings)


def _shown(method):
    """Its settings, for the row's file."""
    own = {k: v for k, v in vars(method).items() if k in ("conf", "nms")}
    return own or asdict(method)


def score(method, choose, corpus, last=False):
    """VCSL's figures of a method on a corpus, and what it costs.

    Args:
        method: an aligner.
        choose: keyframes.
        corpus: queries.
        last: give the last frame of a copy as its end, as the published methods do.
    """
    pairs = [corpus.pair(number) for number in range(len(corpus.pairs))]
    keys = ["-".join(pair) for pair in corpus.pairs]
    kept = {name: len(choose(own)) for name, own in corpus.features.items()}
    both = [(pair.query, pair.reference) for pair in pairs]
    pattern.spans_of_features(method, choose, both[:16])  # compiles
    begin = time.process_time()
    spans = pattern.spans_of_features(method, choose, both)
    took = time.process_time() - begin
    boxes = [align.whole(own, end_exclusive=not last).tolist() for own in spans]
    found = dict(zip(keys, boxes, strict=True))
    labels = {key: own for key, own in zip(keys, corpus.boxes, strict=True) if len(own)}
    figures = protocol.evaluate(labels, found, pairs=keys)
    cells = sum(kept[q] * kept[r] for q, r in corpus.pairs)
    whole = sum(q.shape[0] * r.shape[0] for q, r in both)
    frames = sum(map(len, corpus.features.values()))
    figures |= {"frames kept": sum(kept.values()) / frames, "cells": cells / whole}
    return figures | {"ms per pair": 1000 * took / len(keys)}


def table(bench, rows, seeds):
    """Mean and standard deviation over the seeds that are there."""
    lines = [f"| row | seeds | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for row in rows:
        there = [found for seed in seeds if (found := bench.scores(row, seed)) is not None]
        cells = []
        for name in COLUMNS:
            share = 1 if name in ("ms per pair", "training s") else 100
            values = [share * found[name] for found in there]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "")
        lines.append(f"| {row} | {len(there)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ends(bench, seeds):
    """F of the classical methods by where segments end, with the settings of their rows."""
    print(
        "| method | seeds | last frame: seen, held out | over: seen, held out |\n|---|---|---|---|"
    )
    for row in ("HV", "TN", "DP", "DTW"):
        there = {seed: found for seed in seeds if (found := bench.scores(row, seed)) is not None}
        figures = {last: [] for last in (True, False)}
        for seed, found in there.items():
            data, method = bench.data(seed), align.with_settings(row, found["method"])
            choose = pattern.Keyframes(ssan.Part(bench.settings("spd", 1, seed), 0))
            for last, rows in figures.items():
                rows.append([100 * score(method, choose, data[t], last)["f1"] for t in TESTS])
        cells = [
            ", ".join(f"{statistics.fmean(column):.1f}" for column in zip(*rows, strict=True))
            for rows in figures.values()
        ]
        print(f"| {row} | {len(there)} | {' | '.join(cells)} |", flush=True)


def main():
    """Makes what is missing, seed by seed, so that a cut table still compares all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/clips"), help="of the packages")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dry-run", action="store_true", help="only show the table")
    parser.add_argument("--ends", action="store_true", help="what the end of segments is worth")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.out, args.cache.absolute(), args.steps)
    if args.ends:
        return ends(bench, args.seeds)
    for seed in args.seeds:
        for row in args.rows:
            if not args.dry_run:
                bench.make(row, seed)
                print(table(bench, args.rows, args.seeds), flush=True)
    if args.dry_run:
        print(table(bench, args.rows, args.seeds))


if __name__ == "__main__":
    main()
