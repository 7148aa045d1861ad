# SPDX-License-Identifier: Apache-2.0
"""Copied segments on edited real clips: trained detectors and keyframes against classical methods.

    python benchmarks/video_segments.py --out runs/video [--cache DIR] [--rows HV SPD]
                                        [--seeds 0 1 2] [--steps 400] [--dry-run] [--ends]

Clips and features are those of benchmarks/video_clips.py. A seed draws the queries of training and
of two tests, one of the kinds of edits that training has and one of others, both of videos that
training has not; and it trains. Settings of the classical methods and the detectors' confidence are
those of the best F on a third of the training queries. All segments end where the copy is over.

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again.
"""

import itertools
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import code_tree
import numpy as np
import row_table
import video_clips

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
SPLITS = {"test": ROWS}
# F and recall of the tests, frames kept and cells in per cent.
COLUMNS = ("F seen", "R seen", "F held out", "R held out", "kept", "cells", "ms", "trained")


class Bench:
    """Queries, trainings and scores under one folder.

    Args:
        out: the folder.
        cache: of the packages with the clips.
        steps: of a training.
        dry: make nothing.
    """

    def __init__(self, out, cache, steps, *, dry=False):
        self.out, self.cache, self.steps, self.dry = out.absolute(), cache, steps, dry
        self.code = code_tree.tree("m2jax", "benchmarks/video_clips.py")
        self._clips = None

    def settings(self, kind, window, seed):
        """Of a training."""
        return ssan.Settings(kind=kind, window=window, seed=seed, steps=self.steps)

    def queries(self, seed):
        """All that the queries of a seed depend on."""
        return ["queries", seed, TRAINING, TEST, self.code]

    def made(self, row, seed):
        """All that the row's figures depend on."""
        method, window, kept, begun = ROWS[row]
        kind = "ssan" if kept == "ssan" else "spd"
        settings = asdict(self.settings(kind, window, seed)) if method == "SPD" else GRIDS[method]
        own = [row, settings, window, kept, begun, self.steps if kept == "ske" else 0, CONFS, TUNED]
        return own + self.queries(seed)

    def data(self, seed):
        """Queries of training and tests, kept in a file."""
        arrays = row_table.arrays(self.out, self.queries(seed), lambda: self.drawn(seed))
        return {name: _corpus(arrays, name) for name in ("train", *TESTS)}

    def drawn(self, seed):
        """Queries of training and tests, as arrays by name."""
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
            pairs = {"pairs": corpus.pairs, "boxes": corpus.boxes}
            arrays[f"{name}/table"] = np.array(json.dumps(pairs))
        return arrays

    def part(self, kind, window, seed, train, start=None, name=""):
        """A training; its folder is kept, and read if it is there."""
        settings = self.settings(kind, window, seed)
        own = [asdict(settings), name, self.queries(seed)]
        folder = self.out / f"part-{name or kind}-{seed}-{row_table.run_name(own)}"
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
        """Trains, tunes and scores a row."""
        data = self.data(seed)
        choose, methods, seconds = self.chosen(row, seed, data["train"])
        train = data["train"]
        some = Corpus(train.features, train.pairs[:TUNED], train.boxes[:TUNED])
        tuned = [score(method, choose, some)["f1"] for method in methods]
        best = int(np.nanargmax(tuned))
        found = {"method": _settings(methods[best]), "tuned f1": tuned[best], "trained": seconds}
        for test in TESTS:
            own = score(methods[best], choose, data[test])
            found |= shown(own, test)
        return found

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        return row_table.figures(
            self.out, self.made(row, seed), lambda: self.make(row, seed), dry=self.dry
        )


def _corpus(arrays, name):
    table = json.loads(str(arrays[f"{name}/table"]))
    features = {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}/")}
    features.pop("table")
    return Corpus(features, [tuple(pair) for pair in table["pairs"]], table["boxes"])


def classical(name, settings):
    """A classical method: VCSL's settings of 2023-03, but for some."""
    return align.with_settings(name, asdict(align.BENCHMARK[name]) | settings)


def shown(own, test):
    """The figures of ``score`` by column; what is of no test is the last one's."""
    names = {"F": "f1", "R": "recall", "P": "precision"}
    found = {f"{short} {test}": 100 * own[name] for short, name in names.items()}
    found |= {"kept": 100 * own["frames kept"], "cells": 100 * own["cells"]}
    return found | {"ms": own["ms per pair"]}


def _settings(method):
    """A method's settings, for the row's file."""
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


def ends(bench, seeds):
    """F of the classical methods by where segments end, with the settings of their rows."""
    print(
        "| method | seeds | last frame: seen, held out | over: seen, held out |\n|---|---|---|---|"
    )
    for row in ("HV", "TN", "DP", "DTW"):
        there = {seed: found for seed in seeds if (found := bench.figures(row, seed)) is not None}
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
    """Makes what is missing and prints the table."""
    parser = row_table.arguments(__doc__, SPLITS)
    parser.add_argument("--cache", type=Path, default=Path("runs/clips"), help="of the packages")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ends", action="store_true", help="what the end of segments is worth")
    args = row_table.parsed(parser, SPLITS)
    args.cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.out, args.cache.absolute(), args.steps, dry=args.dry_run or args.ends)
    if args.ends:
        ends(bench, args.seeds)
    else:
        row_table.walk(args, bench.figures, COLUMNS)


if __name__ == "__main__":
    main()
