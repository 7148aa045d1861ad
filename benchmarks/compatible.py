# SPDX-License-Identifier: Apache-2.0
"""Whether a new model can search an old one's vectors, by how it was trained, on emoji.

    python benchmarks/compatible.py --out runs/compatible [--init runs/demo] [--rows ...]
                                    [--seeds 0 1 2] [--epochs 16] [--old-epochs 4] [--dry-run]

The old model is trained on a share of the classes (concepts) and for fewer epochs, the new ones on
all classes. All start from the same tower, that of the model --init or a small one from nothing,
with fresh heads, the old model's drawn with another seed; a seed has one old model. Concepts of the
test were not trained on here; a tower of --init may have seen them. mAP in per cent over drawings
of these concepts in the styles of training (known) and in two new ones (new): each drawing is a
query, those of its own style with its concept are left out. "self": new queries, new gallery;
"cross": new queries, old gallery. An upgrade is compatible where cross is above the old model's
self. P_up, P_comp and P_1 are those of m2jax retrieval upgrade-report over both sets, against the
row "alone". The row "chance" has random vectors.

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again; one
that was cut off goes on from its checkpoint.
"""

import shutil
from dataclasses import asdict

import numpy as np
import row_table

from m2jax.config import UserError
from m2jax.tasks import embedder
from m2jax.tasks.ranking import FeatureScores
from m2jax.tasks.reid import evaluate, metrics, readers
from m2jax.tasks.retrieval import train_compatible, training_sets
from m2jax.tasks.retrieval.compatibility import Measured, compatibility
from m2jax.tasks.retrieval.compatible import Settings
from m2jax.tasks.retrieval.train_compatible import Labelled, Recipe

SIZE = 32  # pixels
SHARE = 0.4  # of the classes, that the old model knows
PARTS = ("known", "new")
ROWS = {  # by row: method
    "chance": "",
    "old": "none",
    "alone": "none",
    "AdvBCT": "advbct",
    "BCT": "bct",
    "UniBCT": "unibct",
    "LCE": "lce",
    "Hot-refresh": "hot-refresh",
}
SPLITS = {"test": ROWS}
COLUMNS = [f"{part} {test}" for part in PARTS for test in ("self", "cross", "old self")]
COLUMNS += ["P_up", "P_comp", "P_1", "seconds"]


def config(row, seed, args):
    """Settings, recipe and first parameters of a row."""
    sizes = {"tokens": 1, "height": SIZE, "image_width": SIZE}
    if args.init:
        start = embedder.start_from(args.init, **sizes)
    else:
        start = embedder.start_small(width=64, layers=2, heads=2, patch_size=8, **sizes)
    changes = {"gray": 0.5, "flip": 0.5, "pad": 2}
    settings = Settings(
        tower=start.tower,
        pixels=start.pixels,
        method=ROWS[row],
        dim=64,
        epochs=args.old_epochs if row == "old" else args.epochs,
        **changes,
    )
    # Heads drawn alike would be compatible from the start.
    seed += 1000 if row == "old" else 0
    recipe = Recipe(batch=128, optimizer="adamw", learning_rate=args.learning_rate, seed=seed)
    return settings, recipe, start.params


class Bench:
    """The rows under one folder."""

    def __init__(self, args):
        self.args = args
        self.sets = {}

    def data(self):
        """Test parts and the training set, read once."""
        if not self.sets:
            self.sets = {part: readers.emoji_set(part, size=SIZE) for part in PARTS}
        train = self.sets["known"].train
        labels = train.labels.identities
        names = [str(n) for n in range(int(labels.max()) + 1)]
        return Labelled(train.images, labels, names)

    def model(self, row, seed):
        """Trained, or read where it was."""
        folder = self.args.out.absolute() / "runs" / row_table.run_name(self.made(row, seed))
        if embedder.is_folder(folder):
            return embedder.read(folder)
        settings, recipe, start = config(row, seed, self.args)
        data, stored = self.data(), None
        if row == "old":
            data = training_sets.some_classes(data, SHARE)
        elif row != "alone":
            old = self.model("old", seed)
            data, stored = training_sets.stored_by(old, data, batch=256)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = train_compatible.train(
            data, settings, recipe, folder, stored=stored, start=start, show=False
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return made

    def vectors(self, row, seed, part):
        """Of a test part's drawings."""
        side = self.sets[part].query
        if row == "chance":
            return np.random.default_rng(seed).normal(size=(len(side.images), 64))
        model = self.model(row, seed)
        return evaluate.embed(model, side, 256, lambda _: None)

    def make(self, row, seed):
        """The figures of a row, in per cent."""
        self.data()
        found, measured = {}, {}
        for part in PARTS:
            labels = self.sets[part].query.labels
            new, old = (self.vectors(each, seed, part) for each in (row, "old"))

            def score(queries, gallery, labels=labels):
                scores = FeatureScores(unit(queries), unit(gallery))
                return metrics.evaluate(scores, labels, labels).mean_ap

            each = {"self": score(new, new), "cross": score(new, old), "old self": score(old, old)}
            found |= {f"{part} {name}": 100 * value for name, value in each.items()}
            if row not in ("old", "chance"):
                alone = self.vectors("alone", seed, part)
                measured[part] = Measured(
                    each["old self"], each["self"], each["cross"], score(alone, alone)
                )
        if measured:
            try:
                scores = compatibility(measured)
                found |= {"P_up": scores.p_up, "P_comp": scores.p_comp, "P_1": scores.p_1}
            except UserError as error:  # trained alone no better than the old one
                found["no scores"] = str(error)
        if row != "chance":
            report = self.model(row, seed).report
            found["seconds"] = report["seconds"]
        return found

    def made(self, row, seed):
        """All that the row's figures depend on."""
        settings, recipe, _ = config(row, seed, self.args)
        return [row, SHARE, asdict(settings), asdict(recipe), self.args.init, self.args.old_epochs]

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        return row_table.figures(
            self.args.out, self.made(row, seed), lambda: self.make(row, seed),
            dry=self.args.dry_run,
        )  # fmt: skip


def unit(x):
    """Rows of unit length."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def main():
    """Makes what is missing and prints the table."""
    parser = row_table.arguments(__doc__, SPLITS)
    parser.add_argument("--init", default="", help="a model to start from; default: from nothing")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--old-epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = row_table.parsed(parser, SPLITS)
    row_table.walk(args, Bench(args).figures, COLUMNS)


if __name__ == "__main__":
    main()
