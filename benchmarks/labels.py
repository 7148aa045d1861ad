# SPDX-License-Identifier: Apache-2.0
"""Labels found in composed emoji scenes by adapters that never saw an image, several seeds per row.

    python benchmarks/labels.py --model runs/demo --out runs/labels [--rows ...] [--seeds 0 1 2]
                                [--seen 200] [--held 40] [--scenes 500] [--concepts N] [--dry-run]

Rows: zero-shot; none (adapter without noise), and the noise laws at their sizes; unit rows; the
other losses; residual (the one that takes labels it was not trained with); both (adapter and
zero-shot together); taidpt. mAP in per cent over styles the model never saw, of seen labels and of
held-out ones, which no sentence names; only zero-shot, residual and taidpt have the latter.
Validation (--split validation) is on a training style instead: choose there, report on the test.

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
from m2jax.eval import multilabel
from m2jax.tasks.labels import corpus, features, predict, prompt_tuning, scenes, train, zero_shot
from m2jax.tasks.labels.adapter import Settings

SIGMAS = (0.02, 0.04, 0.08, 0.126, 0.25)
BASE = Settings()
ROWS = {
    "zero-shot": None,
    "none": replace(BASE, sigma=0.0),
    **{f"gaussian {s}": replace(BASE, sigma=s) for s in SIGMAS},
    "uniform 0.08": replace(BASE, sigma=0.08, noise="uniform"),
    "sphere 0.08": replace(BASE, sigma=0.08, noise="sphere"),
    "unit none": replace(BASE, sigma=0.0, normalize="l2"),
    "unit 0.08": replace(BASE, sigma=0.08, normalize="l2"),
    "asymmetric 0.08": replace(BASE, sigma=0.08, loss="asymmetric"),
    "bce 0.08": replace(BASE, sigma=0.08, loss="bce"),
    "both 0.08": replace(BASE, sigma=0.08),
    "residual none": replace(BASE, sigma=0.0, kind="residual"),
    "residual 0.08": replace(BASE, sigma=0.08, kind="residual"),
    "taidpt": prompt_tuning.Recipe(),
}
SPLITS = {"test": ("fluent", "openmoji"), "validation": ("validation",)}
PER_LABEL = 40  # sentences


class Bench:
    """Model, scenes and sentences; each is made once, when a row needs it."""

    def __init__(self, args):
        self.args, self.tree = args, tree()
        self.model = bundle.load(args.model)
        self.data = emoji.load()
        self.chosen = scenes.choose(self.data, args.seen, args.held, concepts=args.concepts)
        self.known = self.chosen.words.of(range(args.seen))
        self.cache = {}

    def file(self, row, seed):
        """Where a row's figures lie."""
        settings = ROWS[row]
        made = {
            "row": row,
            "seed": seed,
            "settings": None if settings is None else asdict(settings),
            "model": features.fingerprint(self.model),
            **{k: getattr(self.args, k) for k in ("seen", "held", "scenes", "split", "concepts")},
        }
        code = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:10]
        return self.args.out / f"{row.replace(' ', '-')}-{seed}-{self.tree}-{code}.json"

    def once(self, key, make):
        """A value that several rows share."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def scenes(self):
        """The scenes of the split, with their labels."""

        def make():
            found = []
            for split in SPLITS[self.args.split]:
                drawings = self.data.drawings(split)
                if split == "validation":
                    drawings = self.data.drawings(split, hold_out_styles=("fxemoji",))
                found.append(scenes.compose(self.data, drawings, self.chosen, self.args.scenes))
            return found

        return self.once("scenes", make)

    def images(self, length):
        """Their features."""

        def make():
            found = [features.images(self.model, s.images, length=length) for s in self.scenes()]
            return np.concatenate(found)

        return self.once(("images", length), make)

    def texts(self, seed, length):
        """Sentences of a seed with their features, and how long both took."""

        def make():
            begin = time.monotonic()
            order = corpus.Order(self.known, ("en", "zh"), PER_LABEL * len(self.known), seed)
            made = corpus.offline(order)
            settings = replace(BASE, normalize="none" if length else "l2")
            return train.encoded(self.model, made, settings), time.monotonic() - begin

        return self.once(("texts", seed, length), make)

    def prompts(self):
        """Class prompts of all labels."""
        return self.once(
            "prompts", lambda: zero_shot.class_prompts(self.model, self.chosen.words, ("en", "zh"))
        )

    def make(self, row, seed):
        """Scores of a row: of the seen labels, of all where it can, and its times."""
        settings = ROWS[row]
        if settings is None:
            return zero_shot.scores(self.images(False), self.prompts()), {}
        if isinstance(settings, prompt_tuning.Recipe):
            return self.taidpt(replace(settings, seed=seed), seed)
        settings = replace(settings, seed=seed)
        length = settings.normalize == "none"
        texts, encoding = self.texts(seed, length)
        known = self.prompts()[: self.args.seen]
        saved = train.fitted(
            texts, self.known, known, settings, {}, languages=("en", "zh"), model=""
        )
        rows = self.images(length)
        if settings.kind == "residual":
            saved = replace(saved, prompts=self.prompts())
        found = predict.scores(saved, rows, "both" if row.startswith("both") else "adapter")
        limits = saved.thresholds
        shown = np.concatenate([s.shown for s in self.scenes()])[:, : self.args.seen]
        chosen = multilabel.f1(found[:, : self.args.seen] > limits, shown)
        figures = {"text of1": saved.report["text_of1"], "of1": chosen.of1, "cf1": chosen.cf1}
        if row.startswith("both"):
            figures = {}
        return found, figures | {"train s": saved.report["train_s"], "encode s": encoding}

    def taidpt(self, recipe, seed):
        """Learned contexts; held-out labels take the same ones."""
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
        file = self.file(row, seed)
        if file.exists():
            return json.loads(file.read_text())
        if self.args.dry_run:
            return None
        found, figures = self.make(row, seed)
        shown = np.concatenate([s.shown for s in self.scenes()])
        seen, held = slice(0, self.args.seen), slice(self.args.seen, None)
        figures["seen"] = 100 * multilabel.mean_ap(found[:, seen], shown[:, seen]).map
        if found.shape[1] > self.args.seen:
            figures["held out"] = 100 * multilabel.mean_ap(found[:, held], shown[:, held]).map
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
        temporary.rename(file)
        return figures


COLUMNS = ("seen", "held out", "of1", "cf1", "text of1", "train s", "encode s")


def table(rows):
    """Mean and standard deviation over seeds."""
    lines = [f"| row | seeds | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for row, there in rows.items():
        cells = []
        for name in COLUMNS:
            values = [each[name] for each in there if name in each]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
        lines.append(f"| {row} | {len(there)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Makes what is missing, seed by seed, so that a cut table still compares all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=SPLITS, default="test")
    for name, value in (("seen", 200), ("held", 40), ("scenes", 500), ("concepts", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dry-run", action="store_true", help="only show what is there")
    args = parser.parse_args()
    bench = Bench(args)
    found = {row: [] for row in args.rows}
    for seed in args.seeds:
        for row in args.rows:
            figures = bench.figures(row, seed)
            if figures is not None:
                found[row].append(figures)
                print(row, seed, {k: round(v, 3) for k, v in figures.items()}, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
