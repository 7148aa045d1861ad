# SPDX-License-Identifier: Apache-2.0
"""What each pretraining objective brings: the same model, data and steps, several seeds per row.

    python benchmarks/objectives.py --out runs/objectives [--rows itc m2] [--seeds 0 1 2]
                                    [--steps 300] [--dry-run]

Rows: itc; itc+ic (CoCa's); sycoca-random and sycoca (TG-MIM beside them, with random and with
attentive masking); m2 (ITC, CMLM, CMIM). All are trained on composed scenes of emoji drawings and
scored on scenes in styles they never saw. M2's visual tokenizer is distilled from the itc run of
the same seed, in as many steps: those two are made first where they are missing.

A finished row leaves a file named by the code of m2jax/ and the config, and is not made again; one
that was cut off is resumed by `m2jax train`.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import row_table

from m2jax import config
from m2jax.config_files import load_config
from m2jax.obs.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("itc", "itc+ic", "sycoca-random", "sycoca", "m2")
# Few enough concepts for 300 steps to show each some 350 times.
CONCEPTS, SUITE = 120, "emoji-scenes-120"
BATCH = 64
STYLES, LANGUAGES = ("fluent", "openmoji"), ("en", "zh")
SPLITS = {"test": ROWS}
SCORES = ("mean_recall", "i2t_r1", "pointing", "cider", "bleu4")  # of scenes, in per cent
COLUMNS = [f"{name} {language}" for name in SCORES for language in LANGUAGES]
COLUMNS += ["step ms", "seconds"]
NEEDS = {"tokenizer": "itc", "m2": "tokenizer"}  # by row: the run of the same seed it starts from


def losses(row):
    """The objectives of a row; weights are CoCa's 1 and 2, and 1 for what is masked."""
    caption = config.Caption(weight=2.0, layers=2)
    made = {"itc": {}, "itc+ic": {"caption": caption}}
    for name, which in (("sycoca-random", "random"), ("sycoca", "high")):
        made[name] = {
            "caption": dataclasses.replace(caption, patches=which, ratio=0.5),
            "masked_image": config.MaskedImage(weight=1.0, layers=1, patches=which),
        }
    tokenizer = config.VisualTokenizer(
        codes=512, encoder_layers=2, weight=1.0 if row == "tokenizer" else 0.0
    )
    made["tokenizer"] = {"visual_tokenizer": tokenizer}
    made["m2"] = {
        "masked_text": config.MaskedText(weight=1.0),
        "masked_tokens": config.MaskedTokens(weight=1.0),
        "visual_tokenizer": tokenizer,
    }
    return config.Loss(**made[row])


def experiment(row, seed, steps):
    """The run of a row; only its losses differ from another's."""
    base = load_config("emoji")
    sizes = {"width": 128, "heads": 2, "out_dim": 128, "patch_size": 8, "max_text_len": 20}
    model = dataclasses.replace(base.model, **sizes)
    augment = dataclasses.replace(base.data.augment, flip=0.0, mix=0.0)  # left must stay left
    return dataclasses.replace(
        base,
        model=config.resolve(model),
        data=dataclasses.replace(
            base.data,
            name="emoji-scenes",
            concepts=CONCEPTS,
            views=1,
            batch_size=BATCH,
            augment=augment,
        ),
        loss=losses(row),
        train=dataclasses.replace(base.train, steps=steps, seed=seed, log_every=20),
        checkpoint=dataclasses.replace(base.checkpoint, every=100),
        eval=dataclasses.replace(base.eval, suite="" if row == "tokenizer" else SUITE),
    )


def of_styles(found):
    """A run's scores by column: means over the styles, in per cent."""
    figures = {}
    for name in SCORES:
        for language in LANGUAGES:
            keys = [f"scenes/{style}/{language}/{name}" for style in STYLES]
            if all(key in found for key in keys):
                figures[f"{name} {language}"] = 100 * statistics.fmean(found[key] for key in keys)
    return figures


class Bench:
    """The rows under one folder."""

    def __init__(self, args):
        self.args, self.out = args, args.out.absolute()

    def folder(self, row, seed):
        """Of a run."""
        return self.out / "runs" / row_table.run_name(self.made(row, seed))

    def config(self, row, seed):
        """The experiment with the run it starts from named."""
        made = experiment(row, seed, self.args.steps)
        if row not in NEEDS:
            return made
        begun = str(self.folder(NEEDS[row], seed) / "run")
        if row == "tokenizer":
            return dataclasses.replace(made, finetune=config.Finetune(init=begun))
        tokens = dataclasses.replace(made.loss.masked_tokens, tokenizer=begun)
        return dataclasses.replace(made, loss=dataclasses.replace(made.loss, masked_tokens=tokens))

    def made(self, row, seed):
        """All that the row's figures depend on; runs lie where they may."""
        return json.loads(config.to_json(self.config(row, seed)).replace(str(self.out), ""))

    def make(self, row, seed):
        """Trains and scores a run, and first the one it starts from."""
        if row in NEEDS:
            self.figures(NEEDS[row], seed)
        folder = self.folder(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "experiment.json"
        file.write_text(config.to_json(self.config(row, seed)))
        begin = time.monotonic()
        command = ["-m", "m2jax", "train", "--config", str(file), "--workdir", str(folder / "run")]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        seconds = time.monotonic() - begin
        metrics = folder / "run" / "metrics.json"
        found = json.loads(metrics.read_text()) if metrics.exists() else {}
        steps = read_rows(folder / "run" / "metrics.jsonl")[1:]  # the first has the compilation
        step_ms = 1e3 * statistics.median(BATCH / step["samples_per_s"] for step in steps)
        return found | of_styles(found) | {"step ms": step_ms, "seconds": seconds}

    def figures(self, row, seed):
        """The row's figures; made if they are not there."""
        return row_table.figures(
            self.out, self.made(row, seed), lambda: self.make(row, seed), dry=self.args.dry_run
        )


def main():
    """Makes what is missing and prints the table."""
    parser = row_table.arguments(__doc__, SPLITS)
    parser.add_argument("--steps", type=int, default=300)
    args = row_table.parsed(parser, SPLITS)
    row_table.walk(args, Bench(args).figures, COLUMNS)


if __name__ == "__main__":
    main()
