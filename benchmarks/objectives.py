# SPDX-License-Identifier: Apache-2.0
"""What each pretraining objective brings: the same model, data and steps, several seeds per row.

    python benchmarks/objectives.py --out runs/objectives [--rows itc m2] [--seeds 0 1 2]
                                    [--steps 300] [--dry-run]

Rows: itc; itc+ic (CoCa's); sycoca-random and sycoca (TG-MIM beside them, with random and with
attentive masking); m2 (ITC, CMLM, CMIM). All are trained on composed scenes of emoji drawings and
scored on scenes in styles they never saw. M2's visual tokenizer is distilled from the itc run of
the same seed, in as many steps: those two are made first where they are missing.

A finished run leaves scores.json in a folder named by the code of m2jax/ (git's hash of it) and the
config, and is not made again; one that was cut off is resumed by `m2jax train`. The table of what
is there is printed after each run.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from code_tree import tree

from m2jax import config
from m2jax.config_files import load_config
from m2jax.obs.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("itc", "itc+ic", "sycoca-random", "sycoca", "m2")
# Few enough concepts for 300 steps to show each some 350 times.
CONCEPTS, SUITE = 120, "emoji-scenes-120"
STYLES, LANGUAGES = ("fluent", "openmoji"), ("en", "zh")
COLUMNS = ("mean_recall", "i2t_r1", "pointing", "cider", "bleu4")  # of scenes, in per cent


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
            batch_size=64,
            augment=augment,
        ),
        loss=losses(row),
        train=dataclasses.replace(base.train, steps=steps, seed=seed, log_every=20),
        checkpoint=dataclasses.replace(base.checkpoint, every=100),
        eval=dataclasses.replace(base.eval, suite="" if row == "tokenizer" else SUITE),
    )


class Runs:
    """The runs under one folder."""

    def __init__(self, out, steps):
        self.out, self.steps, self.tree = out.absolute(), steps, tree()

    def folder(self, row, seed):
        """Of a run; its config includes, by their folders, the runs it starts from."""
        text = config.to_json(self.config(row, seed)).replace(str(self.out), "")
        code = hashlib.sha256(text.encode()).hexdigest()[:10]
        return self.out / f"{row}-{seed}" / f"{self.tree}-{code}"

    def config(self, row, seed):
        """The experiment with the runs it needs named."""
        made = experiment(row, seed, self.steps)
        if row == "tokenizer":
            init = str(self.folder("itc", seed) / "run")
            return dataclasses.replace(made, finetune=config.Finetune(init=init))
        if row == "m2":
            named = str(self.folder("tokenizer", seed) / "run")
            tokens = dataclasses.replace(made.loss.masked_tokens, tokenizer=named)
            loss = dataclasses.replace(made.loss, masked_tokens=tokens)
            return dataclasses.replace(made, loss=loss)
        return made

    def make(self, row, seed):
        """Trains and scores a run if it is not there."""
        folder = self.folder(row, seed)
        if (folder / "scores.json").exists():
            return
        for other in {"tokenizer": ["itc"], "m2": ["tokenizer"]}.get(row, []):
            self.make(other, seed)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "experiment.json"
        file.write_text(config.to_json(self.config(row, seed)))
        begin = time.monotonic()
        command = ["-m", "m2jax", "train", "--config", str(file), "--workdir", str(folder / "run")]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        metrics = folder / "run" / "metrics.json"
        found = json.loads(metrics.read_text()) if metrics.exists() else {}
        rows = read_rows(folder / "run" / "metrics.jsonl")
        found["seconds"] = time.monotonic() - begin
        found["step_ms"] = 1e3 * statistics.median(64 / r["samples_per_s"] for r in rows[1:])
        (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")

    def scores(self, row, seed):
        """The figures of a run, means over styles, or none where it is not there."""
        file = self.folder(row, seed) / "scores.json"
        if not file.exists():
            return None
        found, figures = json.loads(file.read_text()), {}
        for name in COLUMNS:
            for language in LANGUAGES:
                keys = [f"scenes/{style}/{language}/{name}" for style in STYLES]
                if all(key in found for key in keys):
                    mean = statistics.fmean(found[key] for key in keys)
                    figures[f"{name} {language}"] = 100 * mean
        return figures | {"step ms": found["step_ms"], "seconds": found["seconds"]}


def table(runs, rows, seeds):
    """Mean and standard deviation over the seeds that are there, a row per objective."""
    names = [f"{name} {language}" for name in COLUMNS for language in LANGUAGES]
    names += ["step ms", "seconds"]
    lines = [f"| row | seeds | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for row in rows:
        there = [found for seed in seeds if (found := runs.scores(row, seed)) is not None]
        cells = []
        for name in names:
            values = [found[name] for found in there if name in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "")
        lines.append(f"| {row} | {len(there)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Makes what is missing, seed by seed, so that a cut table still compares all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--dry-run", action="store_true", help="only show the table of what is there"
    )
    args = parser.parse_args()
    runs = Runs(args.out, args.steps)
    for seed in args.seeds:
        for row in args.rows:
            if not args.dry_run:
                runs.make(row, seed)
                print(table(runs, args.rows, args.seeds), flush=True)
    if args.dry_run:
        print(table(runs, args.rows, args.seeds))


if __name__ == "__main__":
    main()
