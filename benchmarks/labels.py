# SPDX-License-Identifier: Apache-2.0
"""Labels found in composed emoji scenes by adapters that never saw an image, several seeds per row.

    python benchmarks/labels.py --model runs/demo --out runs/labels --split validation
    python benchmarks/labels.py --model runs/demo --out runs/labels
                                [--rows ...] [--seeds 0 1 2] [--seen 200] [--held 40]
                                [--scenes 1000] [--concepts N] [--dry-run]

On validation, scenes of the training styles, normalisation, loss, law and size of the noise are
swept; what is best there is the default of ``Settings``. The test is on scenes in two styles that
the model never saw: rows differ in one thing from those defaults ("chosen"). mAP in per cent, of
seen labels and of held-out ones, which no sentence names; only zero-shot, residual and taidpt have
the latter. of1 and cf1 are with thresholds from text, "top 3" is of the three best labels of each
scene. "label frequency" ranks labels by how often sentences name them, and images at random.

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again.
"""

import time
from dataclasses import asdict, replace

import numpy as np
import row_table
from code_tree import tree

from m2jax import bundle
from m2jax.data import emoji
from m2jax.eval import multilabel
from m2jax.tasks.labels import corpus, features, predict, prompt_tuning, scenes, train, zero_shot
from m2jax.tasks.labels.adapter import Settings

SIGMAS = (0.0, 0.04, 0.08, 0.126, 0.25, 0.5)
CHOSEN = Settings()
FREQUENCY, ZERO_SHOT = "label frequency", "zero-shot"
BASELINES = {FREQUENCY: None, ZERO_SHOT: None}
TEST = BASELINES | {
    "no noise": replace(CHOSEN, sigma=0.0),
    "chosen": CHOSEN,
    "half the noise": replace(CHOSEN, sigma=CHOSEN.sigma / 2),
    "twice the noise": replace(CHOSEN, sigma=CHOSEN.sigma * 2),
    **{law: replace(CHOSEN, noise=law) for law in ("gaussian", "uniform", "sphere")},
    **{loss: replace(CHOSEN, loss=loss) for loss in ("ranking", "asymmetric", "bce")},
    "unit rows, no noise": replace(CHOSEN, sigma=0.0, normalize="l2"),
    "unit rows": replace(CHOSEN, normalize="l2"),
    "chosen + zero-shot": CHOSEN,
    "residual, no noise": replace(CHOSEN, sigma=0.0, kind="residual"),
    "residual": replace(CHOSEN, kind="residual"),
    "residual, sigma 0.25": replace(CHOSEN, kind="residual", sigma=0.25),
    "residual, sigma 0.5": replace(CHOSEN, kind="residual", sigma=0.5),
    "taidpt": prompt_tuning.Recipe(),
}
TEST = {k: v for k, v in TEST.items() if k not in (CHOSEN.noise, CHOSEN.loss)}
# Sizes with both kinds of rows first; then the other losses and laws, and a residual adapter.
SWEEP = {
    f"{kind} rows, sigma {sigma}": replace(CHOSEN, normalize=normalize, sigma=sigma)
    for kind, normalize in (("long", "none"), ("unit", "l2"))
    for sigma in SIGMAS
}
SWEEP |= {
    f"{loss}, sigma {sigma}": replace(CHOSEN, loss=loss, sigma=sigma)
    for loss in ("ranking", "asymmetric", "bce")
    for sigma in (0.04, 0.126, 0.25)
    if loss != CHOSEN.loss
}
SWEEP |= {
    f"{law}, sigma {sigma}": replace(CHOSEN, noise=law, sigma=sigma)
    for law in ("gaussian", "uniform", "sphere")
    for sigma in (0.04, 0.126, 0.25)
    if law != CHOSEN.noise
}
SWEEP |= {
    f"residual, sigma {s}": replace(CHOSEN, kind="residual", sigma=s)
    for s in (0.0, 0.04, 0.126, 0.25, 0.5)
}
SWEEP |= {
    f"residual {share}, sigma {s}": replace(CHOSEN, kind="residual", sigma=s, share=share)
    for share in (0.2, 0.8)
    for s in (0.126, 0.25)
}
SWEEP |= {
    f"rate {rate}, sigma {sigma}": replace(CHOSEN, learning_rate=rate, sigma=sigma)
    for rate in (4e-3, 1.6e-2)
    for sigma in (0.0, 0.126)
}
SPLITS = {"test": TEST, "validation": BASELINES | SWEEP}
STYLES = ("fluent", "openmoji")
PER_LABEL = 40  # sentences
COLUMNS = (
    "seen",
    "held out",
    "top 3",
    "of1",
    "cf1",
    "text mAP",
    "train s",
    "train CPU s",
    "encode s",
)
# What the features depend on, beside the model.
CODE = (
    "m2jax/models", "m2jax/data", "m2jax/eval/features.py", "m2jax/tasks/labels/features.py",
    "m2jax/tasks/labels/scenes.py", "m2jax/tasks/labels/corpus.py",
    "m2jax/tasks/labels/grammar.py", "m2jax/tasks/labels/zero_shot.py",
)  # fmt: skip


class Bench:
    """Model, scenes and sentences; each is made once, when a row needs it."""

    def __init__(self, args):
        self.args, self.rows = args, SPLITS[args.split]
        self.model = bundle.load(args.model)
        self.data = emoji.load()
        self.chosen = scenes.choose(self.data, args.seen, args.held, concepts=args.concepts)
        self.known = self.chosen.words.of(range(args.seen))
        self.made = {
            "model": features.fingerprint(self.model),
            **{k: getattr(args, k) for k in ("seen", "held", "scenes", "split", "concepts")},
        }
        self.cache = {}

    def once(self, name, make):
        """A value that several rows share."""
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]

    def arrays(self, name, make):
        """As ``once``, over runs."""
        # Scenes are of a split, texts of none.
        made = {k: v for k, v in self.made.items() if name == "images" or k != "split"}
        config = [name, made, tree(*CODE)]
        return self.once(name, lambda: row_table.arrays(self.args.out, config, make))

    def scenes(self):
        """The scenes of the split, with their labels; as many of each of its parts."""

        def make():
            parts = [self.data.training_styles()]
            if self.args.split == "test":
                parts = [self.data.drawings(style) for style in STYLES]
            each = self.args.scenes // len(parts)
            return [scenes.compose(self.data, p, self.chosen, each) for p in parts]

        return self.once("scenes", make)

    def shown(self):
        """True at the labels of each scene."""
        return np.concatenate([s.shown for s in self.scenes()])

    def images(self, length):
        """Features of the scenes."""

        def make():
            found = [features.images(self.model, s.images, length=True) for s in self.scenes()]
            return {"rows": np.concatenate(found)}

        rows = self.arrays("images", make)["rows"]
        return rows if length else unit(rows)

    def texts(self, seed, length):
        """Sentences of a seed with their features, and how long those took."""
        order = corpus.Order(self.known, ("en", "zh"), PER_LABEL * len(self.known), seed)

        def written():
            return corpus.uncut(self.model, self.known, corpus.offline(order)).sentences

        made = self.once(f"sentences {seed}", written)

        def make():
            begin = time.monotonic()
            rows = features.texts(self.model, [s.text for s in made], length=True)
            return {"rows": rows, "seconds": np.float64(time.monotonic() - begin)}

        found = self.arrays(f"texts {seed}", make)
        rows = found["rows"] if length else unit(found["rows"])
        return train.Texts(made, rows, [s.labels for s in made]), float(found["seconds"])

    def prompts(self):
        """Class prompts of all labels."""

        def make():
            rows = zero_shot.class_prompts(self.model, self.chosen.words, ("en", "zh"))
            return {"rows": rows}

        return self.arrays("prompts", make)["rows"]

    def make(self, row, seed):
        """The figures of a row."""
        settings = self.rows[row]
        if row == FREQUENCY:
            found, figures = self.frequency(seed), {}
        elif row == ZERO_SHOT:
            found, figures = zero_shot.scores(self.images(False), self.prompts()), {}
        elif isinstance(settings, prompt_tuning.Recipe):
            found, figures = self.taidpt(replace(settings, seed=seed), seed)
        else:
            found, figures = self.adapter(row, replace(settings, seed=seed))
        shown, seen = self.shown(), slice(0, self.args.seen)
        figures["seen"] = mean_ap(found[:, seen], shown[:, seen])
        best = multilabel.f1(multilabel.top_k(found[:, seen], 3), shown[:, seen])
        figures["top 3"] = 100 * best.of1
        if found.shape[1] > self.args.seen:
            held = slice(self.args.seen, None)
            figures["held out"] = mean_ap(found[:, held], shown[:, held])
        return figures

    def frequency(self, seed):
        """How often sentences name each label; images in random order, as nothing tells them."""
        texts = self.texts(seed, True)[0]
        counts = np.bincount(np.concatenate(texts.labels), minlength=len(self.chosen.words))
        rng = np.random.default_rng(seed)
        return counts + 1e-3 * rng.random((len(self.shown()), len(counts)))

    def fitted(self, settings):
        """An adapter and its times."""

        def make():
            texts, encoding = self.texts(settings.seed, settings.normalize == "none")
            known = self.prompts()[: self.args.seen]
            begin = time.process_time()
            saved = train.fitted(
                texts, self.known, known, settings, {}, languages=("en", "zh"), model=""
            )
            computed = time.process_time() - begin  # of all threads: what idle cores would take
            times = {"train s": saved.report["train_s"], "train CPU s": computed}
            return saved, times | {"encode s": encoding}

        return self.once(settings, make)

    def adapter(self, row, settings):
        """Scores of an adapter and what its thresholds find."""
        saved, times = self.fitted(settings)
        limits, rows = saved.thresholds, self.images(settings.normalize == "none")
        if settings.kind == "residual":
            saved = replace(saved, prompts=self.prompts())
        if row.endswith("+ zero-shot"):
            return predict.scores(saved, rows, "both"), times
        found = predict.scores(saved, rows)
        above = found[:, : self.args.seen] > limits
        crossed = multilabel.f1(above, self.shown()[:, : self.args.seen])
        exact = {"of1": 100 * crossed.of1, "cf1": 100 * crossed.cf1}
        return found, times | exact | {"text mAP": 100 * saved.report["text_map"]}

    def taidpt(self, recipe, seed):
        """Learned contexts; held-out labels take the same ones, by their names."""
        texts, _ = self.texts(seed, True)
        english = [n for n, s in enumerate(texts.sentences) if s.language == "en"]
        begin = time.monotonic()
        prompts = prompt_tuning.train(
            self.model,
            self.known,
            "en",
            [texts.sentences[n].text for n in english],
            [texts.labels[n] for n in english],
            recipe,
        )
        took = time.monotonic() - begin
        pixels = np.concatenate(
            [self.model.preprocess([s.images.read(i) for i in range(len(s.images))])
             for s in self.scenes()]
        )  # fmt: skip
        return prompt_tuning.scores(self.model, pixels, prompts), {"train s": took}

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        settings = self.rows[row]
        config = [row, seed, None if settings is None else asdict(settings), self.made]
        return row_table.figures(
            self.args.out, config, lambda: self.make(row, seed), dry=self.args.dry_run
        )


def unit(x):
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mean_ap(scores, shown):
    """In per cent, over the labels that a scene shows."""
    there = shown.any(axis=0)
    return 100 * multilabel.mean_ap(scores[:, there], shown[:, there]).map


def main():
    """Makes what is missing and prints the table."""
    parser = row_table.arguments(__doc__, SPLITS)
    parser.add_argument("--model", required=True)
    for name, value in (("seen", 200), ("held", 40), ("scenes", 1000), ("concepts", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = row_table.parsed(parser, SPLITS)
    row_table.walk(args, Bench(args).figures, COLUMNS)


if __name__ == "__main__":
    main()
