# SPDX-License-Identifier: Apache-2.0
"""What each part of the re-identification recipe brings, on emoji, several seeds per row.

    python benchmarks/reid.py --out runs/reid [--init runs/demo] [--rows ...] [--seeds 0 1 2]
                              [--epochs 24] [--dry-run]

An identity is a concept, a camera a drawing style. All rows start from the same tower, that of the
model --init or a small one from nothing, and take as many steps on the same identities; one thing
differs from "four tokens, SDC". Identities of the test were not trained on here; a tower of --init
may have seen them. mAP and R1 in per cent, in the styles of training (known) and in two new ones
(new): each drawing is a query, and those of its own style with its identity are left out. "style
told": how well a ridge classifier of the style does on features of test identities it was not
fitted to, mean over styles; 20 is chance. Three rows train nothing: chance (random vectors), pixels
(cosines of what the images are), and start (the model --init as it is).

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again; one
that was cut off goes on from its checkpoint.
"""

import shutil
from dataclasses import asdict

import numpy as np
import row_table

from m2jax import bundle
from m2jax.tasks import embedder
from m2jax.tasks.ranking import FeatureScores
from m2jax.tasks.reid import evaluate, metrics, readers, train
from m2jax.tasks.reid.dcformer import Settings

SIZE = 32  # pixels
CHANGES = {"erase": 0.0, "gray": 0.5, "flip": 0.5, "pad": 2}
BASE = {"tokens": 4}
# By row: what differs from the base: of the tower (tokens), the loss, the recipe (batches).
ROWS = {
    "chance": None,
    "pixels": None,
    "start": None,
    "one token": {"tokens": 1},
    "four tokens, no diversity": {"diversity": 0.0},
    "four tokens, SDC": {},
    "or: DWC": {"dynamic": True},
    "or: window batches": {"batches": "window"},
    "or: nearest batches": {"batches": "nearest"},
    "or: scenes reversed": {"scenes": "reversal", "scene_weight": 0.5},
    "or: scenes confused": {"scenes": "confusion", "scene_weight": 0.5},
}
SPLITS = {"test": ROWS}
COLUMNS = ("known mAP", "known R1", "new mAP", "new R1", "style told", "numbers", "seconds")


def config(row, seed, args):
    """Settings, recipe and first parameters of a trained row."""
    changes = {**BASE, **ROWS[row]}
    sizes = {"tokens": changes.pop("tokens"), "height": SIZE, "image_width": SIZE}
    if args.init:
        start = embedder.start_from(args.init, **sizes)
    else:
        start = embedder.start_small(width=64, layers=2, heads=2, patch_size=8, **sizes)
    recipe = train.Recipe(
        batches=changes.pop("batches", "pk"), epochs=args.epochs, optimizer=args.optimizer,
        learning_rate=args.learning_rate, seed=seed, save_every=200,
    )  # fmt: skip
    settings = Settings(
        tower=start.tower, identities=0, mean=start.pixels.mean, std=start.pixels.std,
        **CHANGES, **changes,
    )  # fmt: skip
    return settings, recipe, start.params


class Fixed:
    """What trains nothing, as a model: random vectors, or the pixels."""

    def __init__(self, seed=None):
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.pixels = embedder.Pixels(height=SIZE, width=SIZE)

    def preprocess(self, images):
        """Pixels of images."""
        return self.pixels.of(images)

    def encode_image(self, pixels):
        """Vectors of pixels."""
        if self.rng is not None:
            return self.rng.normal(size=(len(pixels), 64))
        flat = 255 - pixels.reshape(len(pixels), -1).astype(np.float32)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def style_told(features, labels):
    """Balanced accuracy of a ridge classifier of the camera, over halves of the identities."""
    x = features - features.mean(0)
    x = np.concatenate([x / (x.std(0) + 1e-6), np.ones((len(x), 1))], axis=1)
    cameras, found = np.unique(labels.cameras), []
    for half in (0, 1):
        fit = labels.identities % 2 == half
        y = (labels.cameras[fit][:, None] == cameras).astype(float)
        weights = 1 / y.mean(0)[y.argmax(1)]  # each style as much as another
        gram = (x[fit] * weights[:, None]).T @ x[fit] + 10.0 * len(y) / 100 * np.eye(x.shape[1])
        answer = np.linalg.solve(gram, (x[fit] * weights[:, None]).T @ y)
        guess = cameras[(x[~fit] @ answer).argmax(1)]
        truth = labels.cameras[~fit]
        found += [(guess[truth == camera] == camera).mean() for camera in cameras]
    return 100 * float(np.mean(found))


def figures(model, sets):
    """Of a model, in per cent."""
    found = {}
    for name, data in sets.items():
        features = evaluate.embed(model, data.query, 256, lambda _: None)
        scores = FeatureScores(features, features)
        made = metrics.evaluate(scores, data.query.labels, data.query.labels)
        found |= {f"{name} mAP": 100 * made.mean_ap, f"{name} R1": 100 * float(made.cmc[0])}
        if name == "known":
            found["style told"] = style_told(features, data.query.labels)
    return found | {"numbers": features.shape[1]}


class Bench:
    """The rows under one folder."""

    def __init__(self, args):
        self.args = args
        self.sets = {}

    def data(self):
        """The test parts, read once."""
        if not self.sets:
            parts = ("known", "new")
            self.sets = {part: readers.emoji_set(part, size=SIZE) for part in parts}
        return self.sets

    def make(self, row, seed, folder):
        """The figures of a row; a training goes on in the folder."""
        if row == "start":
            return figures(bundle.load(self.args.init), self.data())
        if ROWS[row] is None:
            return figures(Fixed(seed if row == "chance" else None), self.data())
        settings, recipe, start = config(row, seed, self.args)
        data = self.data()["known"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        model = train.train(data, settings, recipe, folder, start=start, show=False)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return figures(model, self.data()) | {"seconds": model.report["seconds"]}

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        made = [row, seed, self.args.init]
        if ROWS[row] is not None:
            settings, recipe, _ = config(row, seed, self.args)
            made = [asdict(settings), asdict(recipe), self.args.init]
        folder = self.args.out.absolute() / "runs" / row_table.run_name(made)
        return row_table.figures(
            self.args.out, made, lambda: self.make(row, seed, folder), dry=self.args.dry_run
        )


def main():
    """Makes what is missing and prints the table."""
    parser = row_table.arguments(__doc__, SPLITS)
    parser.add_argument("--init", default="", help="a model to start from; default: from nothing")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--optimizer", choices=train.OPTIMISERS, default="adamw")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = row_table.parsed(parser, SPLITS)
    if not args.init:
        args.rows = [row for row in args.rows if row != "start"]
    row_table.walk(args, Bench(args).figures, COLUMNS)


if __name__ == "__main__":
    main()
