# SPDX-License-Identifier: Apache-2.0
"""The snake recipe part by part on emoji subgroups, several seeds per row.

    python benchmarks/longtail.py --model runs/demo --out runs/longtail --split validation
    python benchmarks/longtail.py --model runs/demo --out runs/longtail
                                  [--rows ...] [--seeds 0 1 2] [--dry-run]

Trained on the training styles' drawings; the test is on fluent and openmoji, which neither the
backbone nor the classifier saw. Validation is on a fifth of the training concepts, which the
classifier does not see there (the backbone does); settings are chosen on it. Each row adds a part
to the one before it, or puts another in its place ("or"). Macro-F1 over observations in per cent:
of the classes there are, and of those with 100 images of training and more (head), fewer than 20
(tail), and between. Three rows train nothing: the majority class, the majority class of the place,
and the nearest centroid of the same features, plain and within the place.

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again.
"""

from dataclasses import asdict, replace

import numpy as np
import row_table
from code_tree import tree

from m2jax import bundle
from m2jax.data import emoji
from m2jax.tasks.labels import features
from m2jax.tasks.longtail import drawings, postprocess, recipe, table, views
from m2jax.tasks.longtail.model import Pairs, Settings
from m2jax.tasks.longtail.recipe import Steps
from m2jax.tasks.longtail.saved import Saved
from m2jax.tasks.longtail.views import Views

ONE = Steps(Views(), 0.0, False, "best")
EPOCHS = 20  # of the classifiers here, in place of 60: what the time of a shared machine allows
PLAIN = Settings(side="none", loss="plain", epochs=EPOCHS)
SIDE = replace(PLAIN, side="dynamic")
ADJUSTED = replace(SIDE, loss="adjusted")
MIRROR = Views(mirror=True)
VIEWS = replace(ONE, views=views.FULL)
FILTER = replace(VIEWS, place_filter=True)
PLACED = replace(ONE, place_filter=True)
TRIVIAL = ("majority class", "place alone", "nearest centroid", "nearest centroid of the place")
# Of each row: the classifier, what follows it, and whether seeds are one ensemble.
ROWS = {
    **dict.fromkeys(TRIVIAL),
    "image alone": (PLAIN, ONE, False),
    # What a place does without any fusion: these train in a minute.
    "image alone, filter by place": (PLAIN, PLACED, False),
    "the same, adjusted logits": (replace(PLAIN, loss="adjusted"), PLACED, False),
    "the same, post hoc, tau 0.7": (PLAIN, replace(PLACED, tau=0.7), False),
    "the same, a residual block": (replace(PLAIN, block=True), PLACED, False),
    # Both contrasts have that block too.
    "the same, SimCLR": (replace(PLAIN, contrast=0.1), PLACED, False),
    "the same, MoCo-v3": (replace(PLAIN, contrast=0.1, contrast_by="moco"), PLACED, False),
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
    "or: SimCLR": (replace(ADJUSTED, contrast=0.001), ONE, False),
    "or: MoCo-v3": (replace(ADJUSTED, contrast=0.001, contrast_by="moco"), ONE, False),
    "+ views (without the hardest)": (ADJUSTED, VIEWS, False),
    "+ filter by place": (ADJUSTED, FILTER, False),
    "or: merging by vote": (ADJUSTED, replace(FILTER, merge="vote"), False),
    "or: merging by mean": (ADJUSTED, replace(FILTER, merge="mean"), False),
    "+ ensemble of three": (ADJUSTED, FILTER, True),
    # With the filter and its views, without what is said to help above, and with the block.
    "filter, views, metadata, plain": (SIDE, FILTER, False),
    "filter, views, metadata, plain, block": (replace(SIDE, block=True), FILTER, False),
    "filter, views, metadata, adjusted, block": (replace(ADJUSTED, block=True), FILTER, False),
    "filter, views, adjusted, block": (replace(PLAIN, loss="adjusted", block=True), FILTER, False),
    "filter, views, block": (replace(PLAIN, block=True), FILTER, False),
    "filter, views, block, ensemble of three": (replace(PLAIN, block=True), FILTER, True),
}
SWEEP = {
    "adjusted, tau 0.4": (replace(ADJUSTED, tau=0.4), ONE, False),
    "post hoc, tau 0.4": (SIDE, replace(ONE, tau=0.4), False),
    "post hoc, tau 1": (SIDE, replace(ONE, tau=1.0), False),
    **{
        f"{by}, weight {weight}": (
            replace(ADJUSTED, contrast=weight, contrast_by=by), ONE, False
        )
        for by in ("simclr", "moco")
        for weight in (0.01, 0.1)
    },
}  # fmt: skip
SPLITS = {"test": ROWS, "validation": ROWS | SWEEP}
HELD = 0.2  # of the training concepts, for validation
COLUMNS = ("macro_f1", "macro_f1_head", "macro_f1_medium", "macro_f1_tail", "accuracy", "train_s")
CODE = (
    "m2jax/models", "m2jax/data", "m2jax/eval/features.py", "m2jax/tasks/labels/features.py",
    "m2jax/tasks/longtail/drawings.py", "m2jax/tasks/longtail/views.py",
)  # fmt: skip


class Bench:
    """Backbone and drawings; features are made once, when a row needs them."""

    def __init__(self, args):
        self.args, self.rows = args, SPLITS[args.split]
        self.model = bundle.load(args.model)
        data = emoji.load()
        train = drawings.part(data, "train")
        test = drawings.part(data, "fluent", "openmoji")
        test = drawings.with_classes(test, {row.label for row in train.rows})
        self.whole = {"training": train, "test": test}
        scored = test
        if args.split == "validation":
            train, scored = drawings.without_observations(train, HELD)
        self.parts = {"train": train, "scored": scored}
        self.codes = table.codes(train.rows)
        self.made = [features.fingerprint(self.model), args.split, HELD]
        self.cache = {}

    def once(self, name, make):
        """A value that several rows share."""
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]

    def features(self, part, kinds):
        """Of a part, in some views; the plain and the mirrored are made for all parts at once."""
        rows = self.parts[part].rows
        name = "test" if part == "scored" and self.args.split == "test" else "training"
        if kinds.scales:
            name, made = f"{self.args.split} {part}", self.parts[part]
        else:
            made = self.whole[name]

        def make():
            whole = kinds if kinds.scales else MIRROR
            images = made.images
            found = views.view_features(self.model, images, whole, length=True, batch=256)
            return {"rows": found}

        config = [name, asdict(kinds) if kinds.scales else "mirror", self.made[0], tree(*CODE)]
        found = self.once(str(config), lambda: row_table.arrays(self.args.out, config, make))
        place = {row.file: n for n, row in enumerate(made.rows)}
        return found["rows"][[place[row.file] for row in rows], : kinds.count]

    def classifier(self, settings):
        """Trained once."""

        def make():
            seen = self.features("train", MIRROR)
            pairs = self.pairs() if settings.contrast else None
            rows = self.parts["train"].rows
            return recipe.fitted(seen, self.codes, rows, settings, model="", pairs=pairs)

        return self.once(settings, make)

    def pairs(self):
        """Two views of each image, those scored later too but without their classes, as there."""
        seen = [self.features(part, MIRROR) for part in self.parts]
        rows = [row for part in self.parts.values() for row in part.rows]
        return Pairs(np.concatenate(seen), self.codes.side(rows))

    def trivial(self, row):
        """Scores of what trains nothing, and the steps after it."""
        labels = self.codes.labels(self.parts["train"].rows)
        classes = len(self.codes.classes)
        counts = np.bincount(labels, minlength=classes)
        scores = np.tile(counts / counts.sum(), (len(self.parts["scored"].rows), 1))
        if row.startswith("nearest centroid"):
            train, scored = (unit(self.features(p, Views())[:, 0]) for p in self.parts)
            centroids = np.stack([train[labels == n].mean(axis=0) for n in range(classes)])
            scores = (1 + scored @ unit(centroids).T) / 2  # cosines, above 0 for the filter
        return scores, replace(ONE, place_filter="place" in row)

    def untrained(self):
        """What the figures need of a classifier that is none."""
        rows = self.parts["train"].rows
        labels, total = self.codes.labels(rows), len(self.codes.classes)
        places = self.codes.places(rows)
        allowed = postprocess.places_of(places, labels, len(self.codes.values["code"]), total)
        counts = np.bincount(labels, minlength=total)
        return Saved(self.codes, PLAIN, {}, counts, allowed, "")

    def make(self, row, seed):
        """The figures of a row."""
        rows, made = self.parts["scored"].rows, []
        if row in TRIVIAL:
            first = self.untrained()
            scores, steps = self.trivial(row)
        else:
            settings, steps, together = self.rows[row]
            seeds = [3 * seed + n for n in range(3)] if together else [seed]
            made = [self.classifier(replace(settings, seed=each)) for each in seeds]
            seen, first = self.features("scored", steps.views), made[0]
            scores = postprocess.ensembled([recipe.scored(m, seen, rows, steps) for m in made])
        found = recipe.figures(first, recipe.finished(first, scores, rows, steps), rows)
        percent = {name: 100 * value for name, value in found.items()}
        return percent | ({"train_s": sum(m.report["train_s"] for m in made)} if made else {})

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        settings = [] if row in TRIVIAL else [asdict(each) for each in self.rows[row][:2]]
        return row_table.figures(
            self.args.out,
            [row, seed, settings, self.made],
            lambda: self.make(row, seed),
            dry=self.args.dry_run,
        )


def unit(x):
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main():
    """Makes what is missing and prints the table."""
    parser = row_table.arguments(__doc__, SPLITS)
    parser.add_argument("--model", required=True)
    args = row_table.parsed(parser, SPLITS)
    row_table.walk(args, Bench(args).figures, COLUMNS)


if __name__ == "__main__":
    main()
