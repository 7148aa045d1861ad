# SPDX-License-Identifier: Apache-2.0
"""The snake recipe part by part on emoji subgroups, several seeds per row.

    python benchmarks/longtail.py --model runs/demo --out runs/longtail [--rows ...]
                                  [--seeds 0 1 2] [--dry-run]

Trained on the training styles' drawings, scored on fluent and openmoji, which neither the backbone
nor the classifier saw. Each row adds a part to the one before it, or puts another in its place
("or"). Macro-F1 over observations in per cent: of the classes there are, and of those with 100
images of training and more (head), fewer than 20 (tail), and between.

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again.
"""

import argparse
import hashlib
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from code_tree import tree

from m2jax import bundle
from m2jax.data import emoji
from m2jax.tasks.labels import features
from m2jax.tasks.longtail import drawings, postprocess, recipe, table, views
from m2jax.tasks.longtail.model import Pairs, Settings
from m2jax.tasks.longtail.recipe import Steps
from m2jax.tasks.longtail.views import Views

ONE = Steps(Views(), 0.0, False, "best")
PLAIN = Settings(side="none", loss="plain")
SIDE = replace(PLAIN, side="dynamic")
ADJUSTED = replace(SIDE, loss="adjusted")
VIEWS = replace(ONE, views=views.FULL)
FILTER = replace(VIEWS, place_filter=True)
# Of each row: the classifier, what follows it, and whether seeds are one ensemble.
ROWS = {
    "image alone": (PLAIN, ONE, False),
    "+ metadata, dynamic MLP": (SIDE, ONE, False),
    "or: as a token": (replace(SIDE, side="token"), ONE, False),
    "or: without dropping it": (replace(SIDE, drop_side=False), ONE, False),
    "+ adjusted logits": (ADJUSTED, ONE, False),
    "or: adjusted, tau 0.7": (replace(ADJUSTED, tau=0.7), ONE, False),
    "or: post hoc, tau 0.7": (SIDE, replace(ONE, tau=0.7), False),
    "or: effective numbers": (replace(SIDE, loss="effective"), ONE, False),
    "or: seesaw": (replace(SIDE, loss="seesaw"), ONE, False),
    "or: re-sampling": (replace(SIDE, oversample=True), ONE, False),
    "+ hardest 70 %": (replace(ADJUSTED, keep=0.7), ONE, False),
    "or: two views' contrast": (replace(ADJUSTED, contrast=0.001), ONE, False),
    "+ views (without the hardest)": (ADJUSTED, VIEWS, False),
    "+ filter by place": (ADJUSTED, FILTER, False),
    "or: merging by vote": (ADJUSTED, replace(FILTER, merge="vote"), False),
    "or: merging by mean": (ADJUSTED, replace(FILTER, merge="mean"), False),
    "+ ensemble of three": (ADJUSTED, FILTER, True),
}
COLUMNS = ("macro_f1", "macro_f1_head", "macro_f1_medium", "macro_f1_tail", "accuracy", "train_s")


class Bench:
    """Backbone and drawings; features are made once, when a row needs them."""

    def __init__(self, args):
        self.args, self.tree = args, tree()
        self.model = bundle.load(args.model)
        data = emoji.load()
        self.train = drawings.part(data, "train")
        self.test = drawings.part(data, "fluent", "openmoji")
        known = {row.label for row in self.train.rows}
        kept = [n for n, row in enumerate(self.test.rows) if row.label in known]
        images = self.test.images
        self.test = drawings.Part(
            type(images)(len(kept), lambda n: images.read(kept[n])),
            [self.test.rows[n] for n in kept],
        )
        self.codes = table.codes(self.train.rows)
        self.cache = {}

    def features(self, part, kinds):
        """Of a part, in some views."""
        key = id(part), kinds
        if key not in self.cache:
            self.cache[key] = views.view_features(
                self.model, part.images, kinds, length=True, batch=64
            )
        return self.cache[key]

    def classifier(self, settings):
        """Trained once."""
        if settings not in self.cache:
            seen = self.features(self.train, Views(mirror=True))
            begin = time.monotonic()
            pairs = self.pairs() if settings.contrast else None
            made = recipe.fitted(seen, self.codes, self.train.rows, settings, model="", pairs=pairs)
            self.cache[settings] = made, time.monotonic() - begin
        return self.cache[settings]

    def pairs(self):
        """Two views of each image, those of the test too but without their classes, as there."""
        parts = [self.features(part, Views(mirror=True)) for part in (self.train, self.test)]
        side = self.codes.side([*self.train.rows, *self.test.rows])
        return Pairs(np.concatenate(parts), side)

    def make(self, row, seed):
        """The figures of a row."""
        settings, steps, together = ROWS[row]
        seeds = [3 * seed + n for n in range(3)] if together else [seed]
        made = [self.classifier(replace(settings, seed=each)) for each in seeds]
        seen = self.features(self.test, steps.views)
        scores = [recipe.scored(saved, seen, self.test.rows, steps) for saved, _ in made]
        first = made[0][0]
        result = recipe.finished(first, postprocess.ensembled(scores), self.test.rows, steps)
        figures = recipe.figures(first, result, self.test.rows)
        percent = {name: 100 * value for name, value in figures.items()}
        return percent | {"train_s": sum(took for _, took in made)}

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        settings, steps, together = ROWS[row]
        made = [row, seed, asdict(settings), asdict(steps), together]
        made.append(features.fingerprint(self.model))
        code = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:10]
        file = self.args.out / f"{self.tree}-{code}-{seed}.json"
        if file.exists():
            return json.loads(file.read_text())
        if self.args.dry_run:
            return None
        found = {"row": row, **self.make(row, seed)}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.rename(file)
        return found


def main():
    """Makes what is missing, seed by seed, so that a cut table still compares all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dry-run", action="store_true", help="only show what is there")
    args = parser.parse_args()
    bench = Bench(args)
    found = {row: [] for row in args.rows}
    for seed in args.seeds:
        for row in args.rows:
            figures = bench.figures(row, seed)
            if figures is not None:
                found[row].append(figures)
                print(row, seed, {k: round(figures.get(k, 0), 2) for k in COLUMNS}, flush=True)
    print(f"| row | seeds | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for row, there in found.items():
        cells = []
        for name in COLUMNS:
            values = [each[name] for each in there if name in each]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
        print(f"| {row} | {len(there)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
